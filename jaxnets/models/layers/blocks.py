"""Blocks that several networks are made of, and how a network forgets what its backward pass can compute again."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers.convolution import Conv
from jaxnets.models.layers.dense import Dense
from jaxnets.models.layers.initializers import he
from jaxnets.models.layers.pooling import flatten
from jaxnets.models.layers.units import identity, relu
from jaxnets.types import Array


class ConvBlock(nn.Module):
    """A convolution (``conv``), a normalisation (``bn``), ReLU, and a function such as pooling.

    Attributes:
      features: channels of the output.
      kernel, strides, padding: of the convolution, down and right alike.
      groups: of channels that do not see each other.
      norm: makes the normalisation from ``dtype`` and ``name``.
      bias: of the convolution; unless given, where there is no normalisation.
      after: what comes after ReLU.
      dtype: of the computation.
    """

    features: int
    kernel: int
    strides: int = 1
    padding: int = 0
    groups: int = 1
    norm: Callable[..., nn.Module] | None = None
    bias: bool | None = None
    after: Callable[[Array], Array] = identity
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        settings: dict[str, Any] = {
            "strides": self.strides,
            "padding": self.padding,
            "feature_group_count": self.groups,
        }
        bias = self.norm is None if self.bias is None else self.bias
        settings |= {"use_bias": bias, "kernel_init": he, "dtype": self.dtype, "name": "conv"}
        x = Conv(self.features, (self.kernel, self.kernel), **settings)(x)
        if self.norm is not None:
            x = self.norm(dtype=self.dtype, name="bn")(x, train)
        return self.after(relu(x))


class DenseHead(nn.Module):
    """Two dense layers with ReLU and dropout (``fc6``, ``fc7``) and one for the logits (``fc8``), of ``[B, ...]``.

    Attributes:
      hidden: units of the first two.
      classes: number of logits.
      dropout: share of units that a training step leaves out.
      dtype: of the computation.
    """

    hidden: int
    classes: int
    dropout: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dense = partial(Dense, kernel_init=he, dtype=self.dtype)
        x = flatten(x)
        for name in ("fc6", "fc7"):
            x = nn.Dropout(self.dropout, deterministic=not train)(relu(dense(self.hidden, name=name)(x)))
        return dense(self.classes, name="fc8")(x)


def conv_chain(
    block: type[nn.Module],
    layers: Iterable[tuple[int, tuple[int, int, int], int, Callable[[Array], Array]]],
    x: Array,
    train: bool,
    dtype: Any,
) -> Array:
    """A `ConvBlock` for each ``(features, (kernel, strides, padding), groups, after)``: ``conv1``, ``conv2``, ..."""
    for number, (features, sizes, groups, after) in enumerate(layers, start=1):
        x = block(features, *sizes, groups, after=after, dtype=dtype, name=f"conv{number}")(x, train)
    return x


def in_turn(network: nn.Module, remat: bool, x: Array, **functions: Callable[[Array], Array]) -> Array:
    """One function after the other, for a network whose layers are no blocks: what each gives is an activation.

    Functions make their layers where they are called, so that these are the network's own, by their own names.

    Args:
      network: the module that calls this.
      remat: whether the backward pass keeps only ``x`` and computes the rest again.
      x: input of the first.
      functions: by the names of what they give, among the network's activations.
    """

    def run(network: nn.Module, x: Array) -> Array:
        for name, function in functions.items():
            x = function(x)
            network.sow("intermediates", name, x)
        return x

    return (nn.remat(run) if remat else run)(network, x)


def remat_if(remat: bool, block: type[nn.Module]) -> type[nn.Module]:
    """The block, ``(x, train)``, or one of which the backward pass keeps only the input and computes the rest again."""
    return nn.remat(block, static_argnums=(2,)) if remat else block  # pyright: ignore
