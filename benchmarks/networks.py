"""The two networks that attacks are compared on, trained once here, and the same weights in PyTorch.

``python -m benchmarks.networks`` trains both into ``runs/benchmarks`` (minutes on two cores): `SmallCNN` on MNIST by
PGD-7 at epsilon 0.3 (an epoch each at 0.1 and 0.2 first), and a ResNet-18 of width 8 on CIFAR-10 by FGSM with a random
start at 8/255.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxnets as jn
from jaxnets.types import LogitsFn

FOLDER = Path("runs/benchmarks")


class Network(NamedTuple):
    """How a network is built and trained. ``to_torch(params, stats)`` gives its twin, which takes ``[B, C, H, W]``."""

    data: str
    module: Any
    attack: Any
    epochs: int
    batch_size: int
    optimizer: Callable[[int], optax.GradientTransformation]
    to_torch: Callable[[Any, Any], Any]
    warm_up: tuple[Any, ...] = ()
    """Attacks of an epoch each, to begin with."""


def load(name: str, data_dir: Path | None = None) -> tuple[LogitsFn, Any, np.ndarray, np.ndarray]:
    """The trained network for JAX, a function that makes its twin in PyTorch, and its test rows and classes."""
    network = NETWORKS[name]
    data = jn.data.load(network.data, data_dir)
    x, y = jn.data.to_float(data.test.images), data.test.labels
    net = jn.from_linen(network.module)
    init_key, train_key, _ = jax.random.split(jax.random.key(0), 3)
    params, stats = net.init(init_key, x[:1])

    def fit(attack, optimizer, params, stats, *, place, epochs):
        state = jn.training.init_state(train_key, params, stats, optimizer)
        settings = {"folder": FOLDER / place, "epochs": epochs, "batch_size": network.batch_size}
        return jn.fit.fit(jn.objectives.adversarial(net, attack), optimizer, state, data.train, **settings)

    for number, attack in enumerate(network.warm_up):
        state = fit(attack, optax.adam(1e-3), params, stats, place=f"{name}/warm-up-{number}", epochs=1)
        params, stats = state.params, state.stats
    total = network.epochs * jn.data.steps_per_epoch(len(data.train.labels), network.batch_size)
    state = fit(network.attack, network.optimizer(total), params, stats, place=name, epochs=network.epochs)
    return (
        net.logits_fn(state.params, state.stats),
        partial(network.to_torch, *jax.tree.map(np.asarray, (state.params, state.stats))),
        x,
        y,
    )


def _small_cnn_to_torch(params: Any, stats: Any) -> Any:
    from torch import nn

    first, second, hidden, last = (params[name] for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1"))
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    _fill(net[0], first["kernel"].transpose(3, 2, 0, 1), first["bias"])
    _fill(net[2], second["kernel"].transpose(3, 2, 0, 1), second["bias"])
    # Flax flattens height, width, channels; PyTorch channels, height, width.
    flat = hidden["kernel"].reshape(7, 7, 32, 100).transpose(3, 2, 0, 1).reshape(100, 1568)
    _fill(net[5], flat, hidden["bias"])
    _fill(net[7], last["kernel"].T, last["bias"])
    return net.eval()


def _resnet18_to_torch(params: Any, stats: Any) -> Any:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, params: Any, stats: Any, stride: int):
            super().__init__()
            convolutions, norms = _numbered(params, "Conv"), _numbered(params, "BatchNorm")
            moments = _numbered(stats, "BatchNorm")
            strides = (stride, 1, stride)
            parts = [
                nn.Sequential(_conv(kernel["kernel"], step), _norm(norm, moment))
                for kernel, norm, moment, step in zip(convolutions, norms, moments, strides, strict=False)
            ]
            self.one, self.two = parts[:2]
            self.shortcut = parts[2] if len(parts) == 3 else nn.Identity()

        def forward(self, x):
            return nn.functional.relu(self.two(nn.functional.relu(self.one(x))) + self.shortcut(x))

    moments = stats["batch_stats"]
    blocks = zip(_numbered(params, "BasicBlock"), _numbered(moments, "BasicBlock"), strict=True)
    layers = [Block(block, moment, 2 if number in (2, 4, 6) else 1) for number, (block, moment) in enumerate(blocks)]
    dense = nn.Linear(*params["Dense_0"]["kernel"].shape)
    _fill(dense, params["Dense_0"]["kernel"].T, params["Dense_0"]["bias"])
    stem = [_conv(params["Conv_0"]["kernel"], 1), _norm(params["BatchNorm_0"], moments["BatchNorm_0"]), nn.ReLU()]
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense).eval()


def _conv(kernel: np.ndarray, stride: int) -> Any:
    from torch import nn

    height, _, inputs, outputs = kernel.shape
    conv = nn.Conv2d(inputs, outputs, height, stride, height // 2, bias=False)
    _fill(conv, kernel.transpose(3, 2, 0, 1))
    return conv


def _norm(params: Any, stats: Any) -> Any:
    from torch import nn

    norm = nn.BatchNorm2d(len(params["scale"]))
    _fill(norm, params["scale"], params["bias"])
    norm.running_mean.copy_(_tensor(stats["mean"]))  # pyright: ignore
    norm.running_var.copy_(_tensor(stats["var"]))  # pyright: ignore
    return norm


def _fill(layer: Any, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    layer.weight.data.copy_(_tensor(weight))
    if bias is not None:
        layer.bias.data.copy_(_tensor(bias))


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.tensor(np.ascontiguousarray(array))


def _numbered(tree: Any, kind: str) -> list[Any]:
    names = [name for name in tree if name.startswith(kind + "_")]
    return [tree[name] for name in sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))]


def _pgd_7(epsilon: float) -> Any:
    return partial(jn.attacks.pgd, threat=jn.Linf(epsilon), steps=7, step_size=epsilon / 3, start=jn.attacks.uniform)


NETWORKS = {
    "small_cnn": Network(
        "mnist",
        jn.models.SmallCNN(),
        _pgd_7(0.3),
        10,
        100,
        lambda total: optax.adam(jn.optimizers.triangular(2e-3, total)),
        _small_cnn_to_torch,
        (_pgd_7(0.1), _pgd_7(0.2)),
    ),
    "resnet18": Network(
        "cifar10",
        jn.models.resnet18(10, width=8, stem=jn.models.cifar_stem),
        partial(jn.attacks.fgsm, threat=jn.Linf(8 / 255), step_size=10 / 255, start=jn.attacks.uniform),
        10,
        128,
        lambda total: optax.chain(
            optax.add_decayed_weights(5e-4), optax.sgd(jn.optimizers.triangular(0.1, total), momentum=0.9)
        ),
        _resnet18_to_torch,
    ),
}


if __name__ == "__main__":
    for name in NETWORKS:
        logits_fn, twin, x, y = load(name)
        right = np.argmax(logits_fn(x[:1000]), axis=-1) == y[:1000]
        print(f"{name}: {right.mean():.1%} of 1,000 test rows right")
