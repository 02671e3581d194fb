"""Weights of PyTorch's networks for ours: names, axes and the order of flattened images."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.models import MLP, VGG, AlexNet, LeNet5, MadryCNN, Perceptron, SmallCNN, ZFNet
from jaxnets.models.calls import Path, calls
from jaxnets.types import Params, Stats
from jaxnets.weights.fitting import check_fit
from jaxnets.weights.reading import read_state

Pairing = Callable[[Mapping[Path, int], Mapping[str, int]], dict[Path, str]]
"""``(layers, modules) -> for the path of each layer the name of a module in PyTorch``.

Both arguments are in order of definition, each entry with the number of axes of its weight: four for a convolution, two
for a dense layer, one for a normalisation.
"""

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

_CHAINS = (MLP, VGG, AlexNet, LeNet5, MadryCNN, Perceptron, SmallCNN, ZFNet)

# What else a part of a name is called, in the networks for CIFAR-10 of kuangliu, fast_adversarial and TRADES.
_ALIASES = {
    "downsample": ("downsample", "shortcut"),
    "shortcut": ("shortcut", "shortcut.0", "convShortcut"),
    "fc": ("fc", "linear"),
    "linear": ("linear", "fc"),
}


def from_torch(
    module: Any,
    image: tuple[int, ...],
    source: str | FilePath | Mapping[str, Any],
    *,
    pair: Pairing | None = None,
) -> tuple[Params, Stats]:
    """Weights that PyTorch saved, for one of our networks: with them both give the same logits.

    `ResNet`, `PreActResNet`, `WideResNet` and `GoogLeNet` find their weights by name, as torchvision, fast_adversarial
    and TRADES call them; networks that are chains of layers, as `AlexNet`, `VGG` and the small ones, by order.

    torchvision's networks take images behind `normalized`, by the mean and deviation published with the weights; its
    GoogLeNet with ``transform_input``, as its published weights have it, by 0.5 and 0.5.

    Args:
      module: the network, a module of Flax's Linen.
      image: the shape of one, ``(H, W, C)``: a dense layer on flattened images has its rows in another order here.
        Every dense layer whose inputs are a multiple of the channels before it is taken for one: networks of your own
        that join several pooled vectors cannot be loaded by this.
      source: a file, ``.pth`` or ``.pt`` (read with ``weights_only=True``, which takes PyTorch) or ``.safetensors``; or
        a ``state_dict`` itself.
      pair: `by_name` or `by_order`, for networks of your own; unless given the one that is right for ours, and
        `by_name` for others.

    Returns:
      ``(params, stats)`` of NumPy arrays, as ``from_linen(module).init`` gives.

    Raises:
      TypeError: where ``module`` is none, a `Classifier` for example.
      ValueError: where names or shapes differ, with all of them, or floats are wanted and others are there; for a file
        of another kind; for a safetensors file, which keeps no order, whose names do not tell it to `by_order`.
      ImportError: where the file needs PyTorch, which is not installed.

    >>> from jaxnets.models import MLP
    >>> weights = {"0.weight": np.ones((3, 4)), "0.bias": np.zeros(3)}
    >>> params, stats = from_torch(MLP((), classes=3), (4,), weights)
    >>> params["Dense_0"]["kernel"].shape, stats
    ((4, 3), {})
    """
    pair = pair or (by_order if isinstance(module, _CHAINS) else by_name)
    network, state = calls(module, image), read_state(source)
    variables = (network.params, network.stats)
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    layers = _layers(leaves, network.channels)
    modules = _modules(state)
    where = "the state_dict" if isinstance(source, Mapping) else str(source)
    if pair is by_order and where.endswith(".safetensors"):
        _check_numbered(modules, where)
    homes = pair(layers, modules)
    names = {path: _name(homes.get(path[:-1]), path) for path in leaves}
    wanted = {names[path]: _shape_in_torch(path, leaf.shape) for path, leaf in leaves.items()}
    check_fit(wanted, {name: value.shape for name, value in state.items()}, where)
    _check_kinds({names[path]: leaf.dtype for path, leaf in leaves.items()}, state, where)

    def convert(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        place = _path(path)
        value = _to_ours(place, state[names[place]], network.channels.get(place[:-1]))
        return np.array(value, leaf.dtype, order="C")  # a copy: PyTorch may go on training its own

    return jax.tree_util.tree_map_with_path(convert, variables)


def by_name(layers: Mapping[Path, int], modules: Mapping[str, int]) -> dict[Path, str]:
    """For the layer ``layer1_0/downsample/0`` the module ``layer1.0.downsample.0``, or as others call it.

    >>> by_name({("block1", "layer_0", "shortcut"): 4}, {"block1.layer.0.convShortcut": 4})
    {('block1', 'layer_0', 'shortcut'): 'block1.layer.0.convShortcut'}
    """
    choices = {path: [".".join(parts) for parts in product(*map(_called, path))] for path in layers}
    taken = {names[0] for names in choices.values()}  # no layer goes by the name of another

    def find(first: str, *others: str) -> str:
        found = [name for name in others if name in modules and name not in taken]
        return first if first in modules or not found else found[0]

    return {path: find(*names) for path, names in choices.items()}


def by_order(layers: Mapping[Path, int], modules: Mapping[str, int]) -> dict[Path, str]:
    """For the first convolution the first convolution, and so on; for a chain of layers, whatever they are called.

    Names that differ in their numbers alone are in the order of those numbers.

    >>> by_order({("Dense_0",): 2, ("Dense_1",): 2}, {"net.10": 2, "net.2": 2})
    {('Dense_0',): 'net.2', ('Dense_1',): 'net.10'}
    """
    pairs = {}
    for axes in set(layers.values()):
        ours = [path for path, number in layers.items() if number == axes]
        theirs = [name for name, number in modules.items() if number == axes]
        pairs |= zip(ours, sorted(theirs, key=_numbers) if _numbered(theirs) else theirs, strict=False)
    return pairs


def _called(part: str) -> tuple[str, ...]:
    return _ALIASES.get(part, (re.sub(r"_(\d+)$", r".\1", part),))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _numbered(names: Iterable[str]) -> bool:
    """Whether names differ in their numbers alone."""
    return len({re.sub(r"\d+", "#", name) for name in names}) <= 1


def _check_numbered(modules: Mapping[str, int], where: str) -> None:
    for axes in set(modules.values()):
        names = [name for name, number in modules.items() if number == axes]
        if not _numbered(names):
            raise ValueError(
                f"{where} does not tell the order of its layers {', '.join(names)}: safetensors keeps none; load it "
                "into PyTorch and pass model.state_dict(), or save that as .pth"
            )


def _path(path: Any) -> Path:
    """Of modules and the array in the last, without the collection that it is from."""
    keys = tuple(key.key for key in path[1:])
    return keys if path[0].idx == 0 else keys[1:]


def _layers(leaves: Mapping[Path, Any], called: Iterable[Path]) -> dict[Path, int]:
    """Modules with arrays of their own, in order of call, and the most axes that one of those has."""
    axes: dict[Path, int] = {}
    for path, leaf in leaves.items():
        axes[path[:-1]] = max(len(leaf.shape), axes.get(path[:-1], 0))
    return {path: axes[path] for path in (*called, *axes) if path in axes}


def _modules(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    axes: dict[str, int] = {}
    for name, value in state.items():
        module = name.rpartition(".")[0]
        axes[module] = max(value.ndim, axes.get(module, 0))
    return axes


def _check_kinds(wanted: Mapping[str, Any], state: Mapping[str, np.ndarray], where: str) -> None:
    """Floats for floats: integers are codes of quantized weights, complex numbers would lose a half."""

    def is_float(dtype: Any) -> bool:
        return jnp.issubdtype(dtype, jnp.floating)

    differ = [name for name, dtype in wanted.items() if is_float(dtype) != is_float(state[name].dtype)]
    if differ:
        said = ", ".join(f"{name} is {state[name].dtype}, the network takes {wanted[name]}" for name in differ)
        raise ValueError(f"{where} holds other dtypes: {said}. Convert them to floats; dequantize quantized ones")


def _name(home: str | None, path: Path) -> str:
    """In PyTorch; of an array without a home the one that it has here."""
    if home is None:
        return "/".join(path)
    return f"{home}.{_LEAVES.get(path[-1], path[-1])}".removeprefix(".")


def _axes(path: Path, count: int) -> tuple[int, ...]:
    """From a kernel ``[h, w, in, out]`` or ``[in, out]`` to PyTorch's ``[out, in, h, w]`` or ``[out, in]``."""
    return (count - 1, count - 2, *range(count - 2)) if path[-1] == "kernel" else tuple(range(count))


def _shape_in_torch(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _axes(path, len(shape)))


def _to_ours(path: Path, value: np.ndarray, channels: int | None) -> np.ndarray:
    if path[-1] == "kernel" and value.ndim == 2 and channels and value.shape[1] % channels == 0:
        # PyTorch flattens an image channel by channel, we place by place.
        value = value.reshape(len(value), channels, -1).swapaxes(1, 2).reshape(value.shape)
    return value.transpose(np.argsort(_axes(path, value.ndim)))
