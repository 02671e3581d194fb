"""LeNet-5, as published in 1998 and as it is built today."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from jaxnets.models.layers import Conv, Dense, avg_pool, conv_general_dilated, flatten, in_turn, max_pool, relu
from jaxnets.types import Array

# Which of the six maps of S2 each of the sixteen maps of C3 sees: the paper's table I.
_C3_SEES = [
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
]  # fmt: skip

# Targets of the output units: the ten digits drawn on 7x12, as the paper does (its drawings, figure 3, are not text).
_DIGITS = (
    ".#####. ..##... .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.",
    "##...## .###... ##...## ##...## ...###. ##..... .##.... ##...## ##...## ##...##",
    "##...## ####... .....## .....## ..####. ##..... ##..... .....## ##...## ##...##",
    "##...## ..##... .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##",
    "##...## ..##... ....##. .....## ##..##. ######. ######. ....##. .#####. ##...##",
    "##...## ..##... ...##.. ..####. ##..##. .....## ##...## ...##.. .#####. .######",
    "##...## ..##... ..##... .....## ####### .....## ##...## ...##.. ##...## .....##",
    "##...## ..##... .##.... .....## ....##. .....## ##...## ..##... ##...## .....##",
    "##...## ..##... ##..... .....## ....##. .....## ##...## ..##... ##...## .....##",
    "##...## ..##... ##..... ##...## ....##. ##...## ##...## .##.... ##...## ....##.",
    ".#####. ####### ####### .#####. ....##. .#####. .#####. .##.... .#####. .####..",
    "....... ....... ....... ....... ....... ....... ....... ....... ....... .......",
)


def scaled_tanh(x: Array) -> Array:
    """``1.7159 tanh(2 x / 3)``: about one at one, where its second derivative is largest."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    """The mean of each 2x2 window times a trainable coefficient, plus a trainable bias: one of each a map."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # The paper sums the four inputs; a coefficient of one on their mean is one quarter on their sum.
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        return scale * avg_pool(x) + bias


class SparseC3(nn.Module):
    """The third layer: sixteen 5x5 convolutions, each over 3, 4 or all 6 of the maps before it."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernels = []
        for number, seen in enumerate(_C3_SEES):
            kernel = self.param(f"kernel_{number}", nn.initializers.lecun_normal(), (5, 5, len(seen), 1))
            kernels.append(jnp.zeros((5, 5, x.shape[-1], 1)).at[:, :, np.array(seen)].set(kernel))
        bias = self.param("bias", nn.initializers.zeros, (len(_C3_SEES),))
        x, kernel, bias = promote_dtype(x, jnp.concatenate(kernels, axis=-1), bias, dtype=self.dtype)
        return conv_general_dilated(x, kernel, (1, 1), "VALID") + bias


class EuclideanRBF(nn.Module):
    """Minus half the squared distance to each digit's drawing: ``z_k = -|x - c_k|^2 / 2``; nothing to train.

    The paper's output is the squared distance; half of it, negated, is a logit with a Gaussian's meaning.
    Of 84 terms, it is computed in single precision at least.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rows = np.array(
            [[1.0 if dot == "#" else -1.0 for dot in row] for line in _DIGITS for row in line.split()], np.float32
        )
        codes = rows.reshape(12, 10, 7).transpose(1, 0, 2).reshape(10, 84)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (-0.5 * jnp.sum((wide[:, None, :] - codes) ** 2, axis=-1)).astype(self.dtype or x.dtype)


# Each once: equal networks are made of the same parts, and share what is compiled for them.
_C3_SEES_ALL = partial(Conv, 16, (5, 5), padding="VALID")


def _max_pooled(dtype: Any) -> Callable[[Array], Array]:
    return max_pool


@cache
def _dense(classes: int) -> Callable[..., nn.Module]:
    return partial(Dense, classes)


class LeNet5(nn.Module):
    """LeNet-5 of 1998: 60,000 trainable parameters; `LeNet5.modern` is the form with ReLU and max-pooling.

    C1 6 maps of 5x5, S2 subsampling, C3 16 maps (sparsely connected), S4 subsampling, C5 120 units, F6 84 units, output
    by distance to ten fixed drawings; ``1.7159 tanh(2 x / 3)`` between. Images of 28x28 are padded to 32x32 with zeros;
    larger ones are taken as they are. The layers' activations have the paper's names: ``c1``, ``s2``, ``c3``, ``s4``,
    ``c5``, ``f6``, ``output``.

    Attributes:
      activation: between the layers.
      subsampling: makes the layers S2 and S4 from ``dtype``.
      c3: makes the third layer from ``dtype``.
      output: makes the last layer from ``dtype``.
      remat: keep only the inputs of C1, C3, C5 and F6 for the backward pass.
      dtype: of the computation.

    LeCun et al. 1998, Gradient-based learning applied to document recognition.

    >>> import jax, jax.numpy as jnp
    >>> jax.eval_shape(LeNet5().init_with_output, jax.random.key(0), jnp.zeros((2, 28, 28, 1)))[0].shape
    (2, 10)
    """

    activation: Callable[[Array], Array] = scaled_tanh
    subsampling: Callable[..., Any] = Subsampling
    c3: Callable[..., Any] = SparseC3
    output: Callable[..., Any] = EuclideanRBF
    remat: bool = False
    dtype: Any = None

    @classmethod
    def modern(cls, classes: int = 10, **settings: Any) -> "LeNet5":
        """ReLU, max-pooling, a full third layer and a dense output: 61,706 parameters on 28x28x1."""
        return cls(
            activation=relu,
            subsampling=_max_pooled,
            c3=_C3_SEES_ALL,
            output=_dense(classes),
            **settings,
        )

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if x.shape[1:3] == (28, 28):
            x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        if min(x.shape[1:3]) < 32:
            raise ValueError(f"LeNet5 takes images of 28x28, or 32x32 and larger, got {x.shape[1]}x{x.shape[2]}")
        layers, act = partial(in_turn, self, self.remat), self._activated
        c1, subsampling = partial(Conv, 6, (5, 5), padding="VALID"), act(self.subsampling)
        x = layers(x, c1=act(c1), s2=subsampling)
        x = layers(x, c3=act(self.c3), s4=subsampling)
        x = layers(flatten(x), c5=act(partial(Dense, 120)))
        x = layers(x, f6=act(partial(Dense, 84)))
        return layers(x, output=lambda x: self.output(dtype=self.dtype)(x))

    def _activated(self, make: Callable[..., Any]) -> Callable[[Array], Array]:
        """The layer that ``make`` makes, and the activation after it."""
        return lambda x: self.activation(make(dtype=self.dtype)(x))
