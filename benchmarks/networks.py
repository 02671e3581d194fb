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
        step = jn.training.make_step(jn.objectives.adversarial(net, attack), optimizer)
        return jn.fit.fit(step, state, data.train, **settings)

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
        def __init__(self, params: Any, stats: Any):
            super().__init__()
            shortens = "downsample" in params
            self.one = nn.Sequential(_conv(params["conv1"], 1 + shortens), _norm(params["bn1"], stats["bn1"]))
            self.two = nn.Sequential(_conv(params["conv2"], 1), _norm(params["bn2"], stats["bn2"]))
            self.shortcut = nn.Identity()
            if shortens:
                kernel, norm = params["downsample"]["0"], params["downsample"]["1"]
                self.shortcut = nn.Sequential(_conv(kernel, 2), _norm(norm, stats["downsample"]["1"]))

        def forward(self, x):
            return nn.functional.relu(self.two(nn.functional.relu(self.one(x))) + self.shortcut(x))

    moments = stats["batch_stats"]
    names = sorted(name for name in params if name.startswith("layer"))
    dense = nn.Linear(*params["fc"]["kernel"].shape)
    _fill(dense, params["fc"]["kernel"].T, params["fc"]["bias"])
    stem = [_conv(params["conv1"], 1), _norm(params["bn1"], moments["bn1"]), nn.ReLU()]
    blocks = [Block(params[name], moments[name]) for name in names]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense).eval()


def _conv(params: Any, stride: int) -> Any:
    from torch import nn

    height, _, inputs, outputs = params["kernel"].shape
    conv = nn.Conv2d(inputs, outputs, height, stride, height // 2, bias=False)
    _fill(conv, params["kernel"].transpose(3, 2, 0, 1))
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
