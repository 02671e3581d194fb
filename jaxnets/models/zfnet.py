"""ZFNet: AlexNet with a finer first layer and in one piece, found by looking at what its layers see."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import (
    ConvBlock,
    DenseHead,
    adaptive_avg_pool,
    conv_chain,
    identity,
    local_response_norm,
    max_pool,
    remat_if,
)
from jaxnets.types import Array


class ZFNet(nn.Module):
    """AlexNet with a first convolution of 7x7 and stride 2, a second of stride 2, and without groups.

    62,357,608 parameters with 1000 classes. Images are 224x224; of others, maps are averaged to the 6x6 places that the
    dense layers take, smaller maps repeated.

    Attributes:
      classes: number of logits.
      features: channels of the five convolutions.
      hidden: units of the first two dense layers.
      stem: kernel, stride and padding of the first convolution.
      second: the same of the second.
      places: rows and columns that the dense layers take.
      dropout: share of the units of the first two dense layers that a training step leaves out.
      remat: keep only each convolution's input for the backward pass; of the dense layers everything is kept.
      dtype: of the computation.

    Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901.

    >>> import jax, jax.numpy as jnp
    >>> net = ZFNet.small(width=8)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    classes: int = 1000
    features: Sequence[int] = (96, 256, 384, 384, 256)
    hidden: int = 4096
    stem: tuple[int, int, int] = (7, 2, 1)
    second: tuple[int, int, int] = (5, 2, 0)
    places: int = 6
    dropout: float = 0.5
    remat: bool = False
    dtype: Any = None

    @classmethod
    def small(cls, classes: int = 10, width: int = 96, **settings: Any) -> "ZFNet":
        """For images of 32x32: a first convolution of 3x3, of ``width`` channels; all others in proportion."""
        features = tuple(width * n // 96 for n in cls.features)
        return cls(classes, features, width * 4096 // 96, (3, 1, 1), (5, 1, 2), places=3, **settings)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        # Padded below and right: the maps shrink from 110 to 55 and from 26 to 13, as in the paper's figure 3.
        pool = partial(max_pool, window=(3, 3), strides=(2, 2), padding=((0, 1), (0, 1)))
        pooled = lambda x: local_response_norm(pool(x))  # noqa: E731
        block = remat_if(self.remat, ConvBlock)
        kernels = (self.stem, self.second, (3, 1, 1), (3, 1, 1), (3, 1, 1))
        last = partial(max_pool, window=(3, 3), strides=(2, 2))
        layers = zip(self.features, kernels, (1,) * 5, (pooled, pooled, identity, identity, last), strict=True)
        x = conv_chain(block, layers, x, train, self.dtype)
        x = adaptive_avg_pool(x, (self.places, self.places))
        return DenseHead(self.hidden, self.classes, self.dropout, self.dtype, name="head")(x, train)
