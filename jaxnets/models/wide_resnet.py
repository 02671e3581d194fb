"""Wide residual networks: fewer layers, many more features."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import BatchNorm, Dense, relu, remat_if
from jaxnets.models.preact_resnet import PreActBlock, convolution_stem
from jaxnets.types import Array


class Group(nn.Module):
    """Blocks of as many features, the first of which may halve the image."""

    blocks: int
    features: int
    stride: int
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block = remat_if(self.remat, PreActBlock)
        for number in range(self.blocks):
            stride = self.stride if number == 0 else 1
            x = block(self.features, stride, self.dropout, self.dtype, name=f"layer_{number}")(x, train)
        return x


class WideResNet(nn.Module):
    """A 3x3 convolution and three groups of `PreActBlock`, with 16, 32 and 64 features times ``widen``; for 32x32.

    Parameters with 10 classes: 36,479,194 for `wide_resnet28_10`, 46,160,474 for `wide_resnet34_10`, 266,796,506 for
    `wide_resnet70_16`.

    Attributes:
      depth: number of layers, ``6 n + 4`` for groups of ``n`` blocks.
      widen: what the numbers of features are multiplied by.
      classes: number of logits.
      dropout: between the convolutions of a block.
      remat: keep only each block's input for the backward pass.
      dtype: of the computation.

    Raises:
      ValueError: for another depth.

    Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> import jax
    >>> net = WideResNet(10, 1)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    depth: int
    widen: int
    classes: int = 10
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"a wide residual network has 6 n + 4 layers, 10 or more, got depth={self.depth}")
        x = convolution_stem(x, 16, train, self.dtype)
        for number, stride in enumerate((1, 2, 2), start=1):
            settings: dict[str, Any] = {"dropout": self.dropout, "remat": self.remat, "dtype": self.dtype}
            x = Group(blocks, 8 * 2**number * self.widen, stride, **settings, name=f"block{number}")(x, train)
        x = relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        return Dense(self.classes, dtype=self.dtype, name="fc")(jnp.mean(x, axis=(1, 2)))


wide_resnet28_10 = partial(WideResNet, 28, 10)
wide_resnet34_10 = partial(WideResNet, 34, 10)
wide_resnet70_16 = partial(WideResNet, 70, 16)
