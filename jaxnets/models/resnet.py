"""Residual networks (He et al. 2016): the family of ResNet-18 to ResNet-152, with ImageNet's stem or CIFAR's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import Conv
from jaxnets.types import Array

_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
_conv = partial(Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    features: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = partial(_norm, use_running_average=not train, dtype=self.dtype)
        y = _conv(self.features, (3, 3), strides=self.stride, padding=1, dtype=self.dtype)(x)
        y = _conv(self.features, (3, 3), padding=1, dtype=self.dtype)(nn.relu(norm()(y)))
        return nn.relu(norm()(y) + _shortcut(x, self.features, self.stride, norm, self.dtype))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 (with the stride) and 1x1 to four times the features, beside a shortcut."""

    features: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = partial(_norm, use_running_average=not train, dtype=self.dtype)
        y = _conv(self.features, (1, 1), dtype=self.dtype)(x)
        y = _conv(self.features, (3, 3), strides=self.stride, padding=1, dtype=self.dtype)(nn.relu(norm()(y)))
        y = _conv(4 * self.features, (1, 1), dtype=self.dtype)(nn.relu(norm()(y)))
        return nn.relu(norm()(y) + _shortcut(x, 4 * self.features, self.stride, norm, self.dtype))


def _shortcut(x: Array, features: int, stride: int, norm: Callable[..., nn.Module], dtype: Any) -> Array:
    if stride == 1 and x.shape[-1] == features:
        return x
    return norm()(_conv(features, (1, 1), strides=stride, dtype=dtype)(x))


def imagenet_stem(x: Array, width: int, norm: Callable[..., nn.Module], dtype: Any = None) -> Array:
    """A 7x7 convolution and a 3x3 max-pooling, both of stride 2."""
    x = nn.relu(norm()(_conv(width, (7, 7), strides=2, padding=3, dtype=dtype)(x)))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore


def cifar_stem(x: Array, width: int, norm: Callable[..., nn.Module], dtype: Any = None) -> Array:
    """A 3x3 convolution that keeps the size, for images of 32x32."""
    return nn.relu(norm()(_conv(width, (3, 3), padding=1, dtype=dtype)(x)))


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, the mean over places, one dense layer.

    The first block of every stage but the first halves the image, in its 3x3 convolution; each stage doubles the
    features.

    Attributes:
      stages: blocks in each stage.
      block: `BasicBlock` or `Bottleneck`.
      classes: number of logits.
      width: features of the first stage; 64 as published.
      stem: `imagenet_stem` or `cifar_stem`.
      dtype: of the computation.

    He et al. 2016, https://arxiv.org/abs/1512.03385.

    >>> import jax
    >>> net = resnet18(10, width=8, stem=cifar_stem)
    >>> net.init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    stages: Sequence[int]
    block: Callable[..., nn.Module]
    classes: int = 1000
    width: int = 64
    stem: Callable[..., Array] = imagenet_stem
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = partial(_norm, use_running_average=not train, dtype=self.dtype)
        x = self.stem(x, self.width, norm, self.dtype)
        for stage, blocks in enumerate(self.stages):
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                x = self.block(self.width * 2**stage, stride, self.dtype)(x, train)
        return nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


resnet18 = partial(ResNet, (2, 2, 2, 2), BasicBlock)
resnet34 = partial(ResNet, (3, 4, 6, 3), BasicBlock)
resnet50 = partial(ResNet, (3, 4, 6, 3), Bottleneck)
resnet101 = partial(ResNet, (3, 4, 23, 3), Bottleneck)
resnet152 = partial(ResNet, (3, 8, 36, 3), Bottleneck)
