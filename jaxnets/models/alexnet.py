"""AlexNet: in two groups, one for each graphics card of its time, and in the one column of its sequel."""

from collections.abc import Callable, Sequence
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


class AlexNet(nn.Module):
    """Five convolutions, overlapping pooling, normalisation across channels, three dense layers with dropout.

    60,965,224 parameters with 1000 classes. Images are 224x224 or 227x227; of others, maps are averaged to the 6x6
    places that the dense layers take, smaller maps repeated. Kernels start at `layers.he`, not at the paper's normal of
    deviation 0.01.

    Attributes:
      classes: number of logits.
      features: channels of the five convolutions.
      hidden: units of the first two dense layers.
      groups: of channels that do not see each other in the second, fourth and fifth convolution.
      norm: after the first two convolutions.
      stem: kernel, stride and padding of the first convolution.
      places: rows and columns that the dense layers take.
      dropout: share of the units of the first two dense layers that a training step leaves out.
      remat: keep only each convolution's input for the backward pass; of the dense layers everything is kept.
      dtype: of the computation.

    Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks.

    >>> import jax, jax.numpy as jnp
    >>> net = AlexNet.small(width=8)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    classes: int = 1000
    features: Sequence[int] = (96, 256, 384, 384, 256)
    hidden: int = 4096
    groups: int = 2
    norm: Callable[[Array], Array] = local_response_norm
    stem: tuple[int, int, int] = (11, 4, 2)
    places: int = 6
    dropout: float = 0.5
    remat: bool = False
    dtype: Any = None

    @classmethod
    def one_column(cls, classes: int = 1000, **settings: Any) -> "AlexNet":
        """Without groups and normalisation: 61,100,840 parameters; the form that torchvision has weights of.

        Krizhevsky 2014, https://arxiv.org/abs/1404.5997.
        """
        return cls(classes, (64, 192, 384, 256, 256), groups=1, norm=identity, **settings)

    @classmethod
    def small(cls, classes: int = 10, width: int = 96, **settings: Any) -> "AlexNet":
        """For images of 32x32: a first convolution of 3x3, of ``width`` channels, and all others in proportion."""
        features = tuple(2 * (width * n // 192) for n in cls.features)  # even, for two groups
        return cls(classes, features, width * 4096 // 96, stem=(3, 1, 1), places=3, **settings)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block, pool = remat_if(self.remat, ConvBlock), partial(max_pool, window=(3, 3), strides=(2, 2))
        pooled = lambda x: pool(self.norm(x))  # noqa: E731
        kernels = (self.stem, (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        groups, after = (1, self.groups, 1, self.groups, self.groups), (pooled, pooled, identity, identity, pool)
        layers = zip(self.features, kernels, groups, after, strict=True)
        x = conv_chain(block, layers, x, train, self.dtype)
        x = adaptive_avg_pool(x, (self.places, self.places))
        return DenseHead(self.hidden, self.classes, self.dropout, self.dtype, name="head")(x, train)
