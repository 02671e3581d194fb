"""Vision transformers: images as sequences of patches."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import Conv, Dense, LayerNorm, remat_if
from jaxnets.types import Array

_norm = partial(LayerNorm, epsilon=1e-6)
_around_zero = nn.initializers.truncated_normal(0.02)


class EncoderBlock(nn.Module):
    """Layer norm and attention, layer norm and two dense layers with GELU, each beside a shortcut."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm, width = partial(_norm, dtype=self.dtype), x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")(norm(name="norm1")(x))
        y = Dense(4 * width, dtype=self.dtype, name="fc1")(norm(name="norm2")(x))
        return x + Dense(width, dtype=self.dtype, name="fc2")(nn.gelu(y, approximate=False))


class ViT(nn.Module):
    """Patches, a class token and trained positions, encoder blocks, one dense layer on the class token.

    The small one, for images of 224x224, unless told otherwise: 22,050,664 parameters with 1000 classes.

    Attributes:
      classes: number of logits.
      patch: side of a patch, which divides that of the image.
      width: of the sequence's vectors.
      depth: number of blocks.
      heads: of attention.
      remat: keep only each block's input for the backward pass.
      dtype: of the computation.

    Raises:
      ValueError: for images that patches do not fill.

    Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929.

    >>> import jax
    >>> net = ViT(patch=4, width=24, depth=2, heads=3, classes=10)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    classes: int = 1000
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"patches of {self.patch}x{self.patch} do not fill an image of {x.shape[1]}x{x.shape[2]}")
        sides = (self.patch, self.patch)
        x = Conv(self.width, sides, strides=sides, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x += self.param("positions", _around_zero, (1, *x.shape[1:])).astype(x.dtype)
        for number in range(self.depth):
            x = remat_if(self.remat, EncoderBlock)(self.heads, self.dtype, name=f"block{number}")(x, train)
        x = _norm(dtype=self.dtype, name="norm")(x)
        return Dense(self.classes, dtype=self.dtype, name="head")(x[:, 0])


vit_small = ViT
