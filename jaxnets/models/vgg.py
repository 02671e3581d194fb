"""VGG: networks of nothing but 3x3 convolutions and 2x2 pooling, with 11 to 19 layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import BatchNorm, ConvBlock, DenseHead, adaptive_avg_pool, max_pool, remat_if
from jaxnets.types import Array


class Stage(nn.Module):
    """Convolutions of 3x3 with as many features each, then pooling to half the size."""

    convolutions: int
    features: int
    number: int
    norm: Callable[..., nn.Module] | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for place in range(1, self.convolutions + 1):
            settings: dict[str, Any] = {
                "norm": self.norm,
                "bias": True,
                "dtype": self.dtype,
                "name": f"conv{self.number}_{place}",
            }
            x = ConvBlock(self.features, 3, padding=1, **settings)(x, train)
        return max_pool(x)


class VGG(nn.Module):
    """Five stages of convolutions of 3x3, with 64 to 512 features, and three dense layers with dropout.

    Images are 224x224; of others, from 32x32 on, maps are averaged to the 7x7 places that the dense layers take,
    smaller maps repeated. `vgg11`, `vgg13`, `vgg16` and `vgg19` are configurations A, B, D and E of the paper; those
    with ``_bn`` have batch norm after each convolution.

    Attributes:
      stages: convolutions in each.
      classes: number of logits.
      norm: makes a normalisation after each convolution.
      width: features of the first stage; the others have 2, 4, 8 and 8 times as many.
      hidden: units of the first two dense layers.
      places: rows and columns that the dense layers take; 1 suits images of 32x32.
      dropout: share of the units of the first two dense layers that a training step leaves out.
      remat: keep only each stage's input for the backward pass; of the dense layers everything is kept.
      dtype: of the computation.

    Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556.

    >>> import jax, jax.numpy as jnp
    >>> net = vgg11(10, width=4, hidden=16, places=1)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    stages: Sequence[int]
    classes: int = 1000
    norm: Callable[..., nn.Module] | None = None
    width: int = 64
    hidden: int = 4096
    places: int = 7
    dropout: float = 0.5
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        stage = remat_if(self.remat, Stage)
        for number, (count, times) in enumerate(zip(self.stages, (1, 2, 4, 8, 8), strict=True), start=1):
            x = stage(count, times * self.width, number, self.norm, self.dtype, name=f"stage{number}")(x, train)
        x = adaptive_avg_pool(x, (self.places, self.places))
        return DenseHead(self.hidden, self.classes, self.dropout, self.dtype, name="head")(x, train)


vgg11 = partial(VGG, (1, 1, 2, 2, 2))
vgg13 = partial(VGG, (2, 2, 2, 2, 2))
vgg16 = partial(VGG, (2, 2, 3, 3, 3))
vgg19 = partial(VGG, (2, 2, 4, 4, 4))
vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn = (partial(net, norm=BatchNorm) for net in (vgg11, vgg13, vgg16, vgg19))
