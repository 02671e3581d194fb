"""Residual networks whose blocks normalise first, and leave the shortcut alone (He et al. 2016, the second paper)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import BatchNorm, Conv, he, remat_if
from jaxnets.types import Array

he_conv = partial(Conv, use_bias=False, kernel_init=he)


class PreActBlock(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice, beside a shortcut.

    Where the shape changes the shortcut is a 1x1 convolution, of what the first ReLU gives.
    """

    features: int
    stride: int = 1
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, norm = partial(he_conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        active = nn.relu(norm(name="bn1")(x, train))
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(active)
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(norm(name="bn2")(y, train)))
        y = conv(self.features, (3, 3), padding=1, name="conv2")(y)
        if self.stride == 1 and x.shape[-1] == self.features:
            return x + y
        return conv(self.features, (1, 1), strides=self.stride, name="shortcut")(active) + y


class PreActBottleneck(nn.Module):
    """Batch norm, ReLU and a convolution, of 1x1, 3x3 (with the stride) and 1x1 to four times the features."""

    features: int
    stride: int = 1
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, norm = partial(he_conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        active = nn.relu(norm(name="bn1")(x, train))
        y = conv(self.features, (1, 1), name="conv1")(active)
        y = nn.relu(norm(name="bn2")(y, train))
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(norm(name="bn3")(y, train)))
        y = conv(4 * self.features, (1, 1), name="conv3")(y)
        if self.stride == 1 and x.shape[-1] == 4 * self.features:
            return x + y
        return conv(4 * self.features, (1, 1), strides=self.stride, name="shortcut")(active) + y


class PreActResNet(nn.Module):
    """A 3x3 convolution, stages of blocks that normalise first, batch norm, ReLU, the mean over places, a dense layer.

    For images of 32x32. The first block of every stage but the first halves the image; each stage doubles the features.
    The form that is trained and published on CIFAR-10: in the paper's the first block's shortcut begins after its first
    ReLU as well.

    Attributes:
      stages: blocks in each stage.
      block: `PreActBlock` or `PreActBottleneck`.
      classes: number of logits.
      width: features of the first stage.
      remat: keep only each block's input for the backward pass.
      dtype: of the computation.

    He et al. 2016, https://arxiv.org/abs/1603.05027.

    >>> import jax
    >>> net = preact_resnet18(width=8)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    stages: Sequence[int]
    block: type[nn.Module] = PreActBlock
    classes: int = 10
    width: int = 64
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block: Callable[..., nn.Module] = partial(remat_if(self.remat, self.block), dtype=self.dtype)
        x = he_conv(self.width, (3, 3), padding=1, dtype=self.dtype, name="conv1")(x)
        for stage, blocks in enumerate(self.stages, start=1):
            for number in range(blocks):
                stride = 2 if stage > 1 and number == 0 else 1
                x = block(self.width * 2 ** (stage - 1), stride, name=f"layer{stage}_{number}")(x, train)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x, train))
        return nn.Dense(self.classes, dtype=self.dtype, name="linear")(jnp.mean(x, axis=(1, 2)))


preact_resnet18 = partial(PreActResNet, (2, 2, 2, 2), PreActBlock)
preact_resnet34 = partial(PreActResNet, (3, 4, 6, 3), PreActBlock)
preact_resnet50 = partial(PreActResNet, (3, 4, 6, 3), PreActBottleneck)
