"""The networks that are attacked and trained, in JAX and with the same weights in PyTorch.

``python -m benchmarks.networks NAME ...`` trains those of them into ``runs/benchmarks`` that are not timed with random
weights, which serve what takes the same time with any: in minutes on two cores `SmallCNN` on MNIST by PGD-7 at epsilon
0.3 (an epoch each at 0.1 and 0.2 first), and by FGSM with a random start `MadryCNN` on MNIST at 0.3 and a ResNet-18 of
width 8 on CIFAR-10 at 8/255; and on a GPU a WRN-28-10 like that ResNet-18, with crops and flips and in bfloat16.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from benchmarks.sides import to_device
from benchmarks.work import Precision
from jaxnets.types import LogitsFn, Params, Stats

FOLDER = Path("runs/benchmarks")


class Training(NamedTuple):
    """How a network is trained."""

    data: str
    attack: Any
    epochs: int
    batch_size: int
    optimizer: Callable[[int], optax.GradientTransformation]
    warm_up: tuple[Any, ...] = ()
    """Attacks of an epoch each, to begin with."""
    augmentations: tuple[Any, ...] = ()
    precision: Precision = "float32"


class Network(NamedTuple):
    """How a network is built. ``to_torch(params, stats)`` gives its twin, which takes ``[B, C, H, W]``."""

    module: Any
    to_torch: Callable[[Any, Any], Any]
    image: tuple[int, int, int]
    training: Training | None = None


class Loaded(NamedTuple):
    """A network with weights, and rows: test rows of what it was trained on, else noise of the classes it gives it.

    Attributes:
      net, params, stats: in JAX.
      twin: makes the same in PyTorch, on its GPU if it has one.
      x: ``[N, H, W, C]``.
      y: ``[N]``.
    """

    net: jn.Classifier
    params: Params
    stats: Stats
    twin: Callable[[], Any]
    x: np.ndarray
    y: np.ndarray

    @property
    def model(self) -> LogitsFn:
        return self.net.logits_fn(self.params, self.stats)


@lru_cache(maxsize=1)
def load(name: str, *, data_dir: Path | None = None, rows: int = 1000, precision: Precision = "float32") -> Loaded:
    """The network, trained first if it is one of those that are and was not, and so many rows. The last is kept.

    It computes in ``precision``, with weights and rows in float32. What JAX multiplies in float32 from then on is
    multiplied as TF32 unless that is ``float32``; CPUs have but one.
    """
    network = NETWORKS[name]
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32" if precision == "float32" else "tensorfloat32")
    net = _computing_in(precision, network.module)
    if network.training is None:
        x = np.random.default_rng(0).uniform(size=(rows, *network.image)).astype(np.float32)
        params, stats = jax.jit(net.init)(jax.random.key(0), x[:1])
        y = np.argmax(jax.jit(net.infer)(params, stats, x), axis=-1)
    else:
        data = _data(network.training.data, data_dir)
        params, stats = _trained(name, network.module, network.training, data)
        x, y = jn.data.to_float(data.test.images[:rows]), data.test.labels[:rows]
    return Loaded(net, params, stats, twin_of(network, params, stats, precision), x, np.asarray(y, np.int32))


@lru_cache(maxsize=1)
def _data(name: str, data_dir: Path | None) -> jn.data.Dataset:
    return jn.data.load(name, data_dir)


def _computing_in(precision: Precision, module: Any) -> jn.Classifier:
    return jn.from_linen(module.clone(dtype=jnp.bfloat16) if precision == "bf16" else module)


def twin_of(network: Network, params: Params, stats: Stats, precision: Precision = "float32") -> Callable[[], Any]:
    """Makes the network in PyTorch, with these weights."""
    arrays = jax.tree.map(np.asarray, (params, stats))
    return lambda: to_device(network.to_torch(*arrays), precision)


def _trained(name: str, module: Any, how: Training, data: jn.data.Dataset) -> tuple[Params, Stats]:
    net = _computing_in(how.precision, module)
    init_key, train_key, _ = jax.random.split(jax.random.key(0), 3)
    params, stats = net.init(init_key, jn.data.to_float(data.test.images[:1]))

    def fit(attack, optimizer, params, stats, *, place, epochs):
        state = jn.training.init_state(train_key, params, stats, optimizer)
        settings = {"folder": FOLDER / place, "epochs": epochs, "batch_size": how.batch_size}
        objective = jn.objectives.adversarial(net, attack)
        if how.augmentations:  # else the attack would draw from another key
            objective = jn.objectives.augmented(objective, *how.augmentations)
        step = jn.training.make_step(objective, optimizer)
        return jn.fit.fit(step, state, data.train, **settings)

    for number, attack in enumerate(how.warm_up):
        state = fit(attack, optax.adam(1e-3), params, stats, place=f"{name}/warm-up-{number}", epochs=1)
        params, stats = state.params, state.stats
    total = how.epochs * jn.data.steps_per_epoch(len(data.train.labels), how.batch_size)
    state = fit(how.attack, how.optimizer(total), params, stats, place=name, epochs=how.epochs)
    return state.params, state.stats


def _small_cnn_to_torch(params: Any, stats: Any) -> Any:
    from torch import nn

    first, second, hidden, last = (params[name] for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1"))
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    _fill(net[0], first["kernel"].transpose(3, 2, 0, 1), first["bias"])
    _fill(net[2], second["kernel"].transpose(3, 2, 0, 1), second["bias"])
    _fill(net[5], _flattened(hidden["kernel"], (7, 7, 32)), hidden["bias"])
    _fill(net[7], last["kernel"].T, last["bias"])
    return net.eval()


def _madry_cnn_to_torch(params: Any, stats: Any) -> Any:
    from torch import nn

    net = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip
    for place, name in ((0, "Conv_0"), (3, "Conv_1")):
        _fill(net[place], params[name]["kernel"].transpose(3, 2, 0, 1), params[name]["bias"])
    _fill(net[7], _flattened(params["Dense_0"]["kernel"], (7, 7, 64)), params["Dense_0"]["bias"])
    _fill(net[9], params["Dense_1"]["kernel"].T, params["Dense_1"]["bias"])
    return net.eval()


def _flattened(kernel: np.ndarray, sizes: tuple[int, int, int]) -> np.ndarray:
    """Flax flattens height, width, channels; PyTorch channels, height, width."""
    return kernel.reshape(*sizes, -1).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)


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


def _wide_resnet_to_torch(params: Any, stats: Any) -> Any:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, params: Any, stats: Any, stride: int):
            super().__init__()
            self.active = nn.Sequential(_norm(params["bn1"], stats["bn1"]), nn.ReLU())
            self.inner = nn.Sequential(
                _conv(params["conv1"], stride), _norm(params["bn2"], stats["bn2"]), nn.ReLU(), _conv(params["conv2"], 1)
            )
            self.shortcut = _conv(params["shortcut"], stride) if "shortcut" in params else None

        def forward(self, x):
            active = self.active(x)
            return self.inner(active) + (self.shortcut(active) if self.shortcut else x)

    moments, blocks = stats["batch_stats"], []
    for group, stride in (("block1", 1), ("block2", 2), ("block3", 2)):
        for number in range(len(params[group])):
            name = f"layer_{number}"
            blocks.append(Block(params[group][name], moments[group][name], stride if number == 0 else 1))
    dense = nn.Linear(*params["fc"]["kernel"].shape)
    _fill(dense, params["fc"]["kernel"].T, params["fc"]["bias"])
    end = [_norm(params["bn1"], moments["bn1"]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense]
    return nn.Sequential(_conv(params["conv1"], 1), *blocks, *end).eval()


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


def _fgsm(epsilon: float) -> Any:
    return partial(jn.attacks.fgsm, threat=jn.Linf(epsilon), step_size=1.25 * epsilon, start=jn.attacks.uniform)


def _cyclic(peak: float, total: int) -> optax.GradientTransformation:
    rate = jn.optimizers.triangular(peak, total)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))


def _resnet18(width: int, training: Training | None = None) -> Network:
    module = jn.models.resnet18(10, width=width, stem=jn.models.cifar_stem)
    return Network(module, _resnet18_to_torch, (32, 32, 3), training)


NETWORKS = {
    "small_cnn": Network(
        jn.models.SmallCNN(),
        _small_cnn_to_torch,
        (28, 28, 1),
        Training(
            "mnist",
            _pgd_7(0.3),
            10,
            100,
            lambda total: optax.adam(jn.optimizers.triangular(2e-3, total)),
            (_pgd_7(0.1), _pgd_7(0.2)),
        ),
    ),
    "madry_cnn": Network(
        jn.models.MadryCNN(),
        _madry_cnn_to_torch,
        (28, 28, 1),
        Training("mnist", _fgsm(0.3), 2, 128, lambda total: optax.adam(jn.optimizers.triangular(1e-3, total))),
    ),
    "resnet18_8": _resnet18(8, Training("cifar10", _fgsm(8 / 255), 10, 128, partial(_cyclic, 0.1))),
    "resnet18_16": _resnet18(16),
    "resnet18_64": _resnet18(64),
    "wrn28_10": Network(
        jn.models.wide_resnet28_10(),
        _wide_resnet_to_torch,
        (32, 32, 3),
        Training(
            "cifar10",
            _fgsm(8 / 255),
            10,
            128,
            partial(_cyclic, 0.1),
            augmentations=(jn.data.random_crop, jn.data.random_flip),
            precision="bf16",
        ),
    ),
}


def main() -> None:
    names = sys.argv[1:]
    trained = [name for name, network in NETWORKS.items() if network.training]
    if not names or set(names) - set(trained):
        raise SystemExit(f"benchmarks.networks: name networks to train of {', '.join(trained)}; got {names}")
    for name in names:
        found = load(name)
        right = np.mean(np.argmax(found.model(found.x), axis=-1) == found.y)
        print(f"{name}: {right:.1%} of 1,000 test rows right")


if __name__ == "__main__":
    main()
