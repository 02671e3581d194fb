"""What a network consists of, found without computing or allocating anything."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxnets.models.calls import mode

_COLUMNS = ("layer", "output", "parameters", "MFLOPs")


class Layer(NamedTuple):
    """A layer or a block: its path, the shape of what it gives for one image, its parameters, its operations."""

    name: str
    output: tuple[int, ...]
    parameters: int
    flops: int


class Summary(NamedTuple):
    """Layers in the order of the computation, and the sums over the whole network; printed as a table.

    Attributes:
      layers: those of at most the wanted depth; a block counts what its parts count.
      parameters: trained numbers.
      flops: multiplications and additions of all dense layers and convolutions, and of attention, for one image; those
        within `flax.linen.scan` and recurrent layers count as one step.
      statistics: numbers that training moves and inference uses.
      activations: numbers that layers give for one image, from which the memory of a backward pass can be guessed; a
        layer that gives back its very input, as dropout in inference and a shortcut without parameters, counts none.
    """

    layers: list[Layer]
    parameters: int
    flops: int
    statistics: int
    activations: int

    def __str__(self) -> str:
        rows = [
            (one.name, "x".join(map(str, one.output)), f"{one.parameters:,}", f"{one.flops / 1e6:,.2f}")
            for one in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        lines = [
            "  ".join((name.ljust(widths[0]), output.rjust(widths[1]), count.rjust(widths[2]), flops.rjust(widths[3])))
            for name, output, count, flops in (_COLUMNS, *rows)
        ]
        lines += [
            f"{self.parameters:,} parameters ({_bytes(self.parameters)} as float32), {self.statistics:,} statistics",
            f"an image: {self.flops / 1e6:,.2f} MFLOPs, {self.activations:,} activations ({_bytes(self.activations)})",
        ]
        return "\n".join(lines)


def summary(module: nn.Module, image: tuple[int, ...], depth: int = 1) -> Summary:
    """The layers of a network for images ``[H, W, C]``, down to the blocks' parts for a larger ``depth``.

    Raises:
      ValueError: where the network does not take such images.

    >>> from jaxnets.models.mlp import MLP
    >>> print(summary(MLP((20, 10)), (8, 8, 1)))
    layer    output  parameters  MFLOPs
    Dense_0      20       1,300    0.00
    Dense_1      10         210    0.00
    Dense_2      10         110    0.00
    1,620 parameters (6.3 KiB as float32), 0 statistics
    an image: 0.00 MFLOPs, 40 activations (160 B)
    """
    variables, outputs, flops, idle = _shapes(module, image)
    params = _flat(variables.get("params", {}))
    statistics = sum(leaf.size for name in variables if name != "params" for leaf in jax.tree.leaves(variables[name]))
    for name in outputs:
        flops[name] += _of_attention(name, outputs)

    def within(values: dict[str, int], name: str) -> int:
        return sum(value for other, value in values.items() if f"{other}/".startswith(f"{name}/"))

    sizes = {name: leaf.size for name, leaf in params.items()}
    layers = [
        Layer(name, output.shape[1:], within(sizes, name), within(flops, name))
        for name, output in outputs.items()
        if name.count("/") < depth
    ]
    leaves = [name for name in outputs if not any(other.startswith(f"{name}/") for other in outputs)]
    activations = sum(math.prod(outputs[name].shape) for name in leaves if name not in idle)
    return Summary(layers, sum(sizes.values()), sum(flops.values()), statistics, activations)


def _shapes(module: nn.Module, image: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any], Counter[str], set[str]]:
    """The variables; by layer what it gives for one image, in the order of the calls, and the operations of its own
    kernels; and which layers give back their input.
    """
    order, flops, idle = [], Counter(), set()

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and args:
            name = "/".join(context.module.path)
            flops[name] += _flops(context.module, args[0], out)
            if out is args[0]:
                idle.add(name)
        return out

    def run(key, x):
        with nn.intercept_methods(watch):
            _, variables = module.init_with_output(key, x, capture_intermediates=True, **mode(module, training=False))
        captured = _flat(variables.pop("intermediates"))  # pyright: ignore
        # What modules sow by other names belongs to layers that are there already; of several results the first is it.
        calls = {path: jax.tree.leaves(values)[:1] for path, values in captured.items() if path.endswith("__call__")}
        first = {path.removesuffix("__call__").strip("/"): value for path, values in calls.items() for value in values}
        order.extend(name for name in first if name)
        return variables, first

    variables, outputs = jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct((1, *image), jnp.float32))
    return variables, {name: outputs[name] for name in order}, flops, idle


def _flat(tree: Any) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def _flops(module: nn.Module, x: Any, out: Any) -> int:
    """Two for each weight of the module's own kernels and place that it is at, in one call."""
    params = module.variables.get("params", {})
    kernels = [leaf for name, leaf in params.items() if name.startswith("kernel") and hasattr(leaf, "size")]
    if not kernels or not hasattr(out, "shape"):
        return 0
    if isinstance(module, nn.ConvTranspose):
        places = math.prod(x.shape[:-1])
    else:
        features = params["bias"].size if "bias" in params else np.prod(getattr(module, "features", out.shape[-1]))
        places = math.prod(out.shape) // int(features)
    return 2 * sum(kernel.size for kernel in kernels) * places


def _of_attention(name: str, outputs: dict[str, Any]) -> int:
    """Of its two products of sequences."""
    if f"{name}/query" not in outputs:
        return 0
    _, length, *vector = outputs[f"{name}/query"].shape
    return 2 * 2 * length * length * math.prod(vector)


def _bytes(numbers: int) -> str:
    size = 4.0 * numbers
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.2f} GiB"
