"""Residual networks (He et al. 2016): ResNet-18 to ResNet-152, and the thinner and deeper ones for images of 32x32."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import BatchNorm, Conv, Dense, max_pool, relu, remat_if
from jaxnets.types import Array

_conv = partial(Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))


class Projection(nn.Module):
    """The input where its shape is right, else a 1x1 convolution of it and batch norm: the paper's option B."""

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.stride == 1 and x.shape[-1] == self.features:
            return x
        x = _conv(self.features, (1, 1), strides=self.stride, dtype=self.dtype, name="0")(x)
        return BatchNorm(dtype=self.dtype, name="1")(x, train)


class Padded(nn.Module):
    """Every ``stride``-th pixel, with zeros for the features that are missing: the paper's option A, no parameters."""

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        missing = self.features - x.shape[-1]
        if self.stride == 1 and not missing:
            return x
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class NoShortcut(NamedTuple):
    """Zero: what is left is a plain network. No module, for there is no activation to name."""

    features: int
    stride: int
    dtype: Any = None
    name: str | None = None

    def __call__(self, x: Array, train: bool) -> Array:
        return jnp.zeros((), x.dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    features: int
    stride: int = 1
    shortcut: Callable[..., Callable[[Array, bool], Array]] = Projection
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, norm = partial(_conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = conv(self.features, (3, 3), padding=1, name="conv2")(relu(norm(name="bn1")(y, train)))
        past = self.shortcut(self.features, self.stride, self.dtype, name="downsample")(x, train)
        return relu(norm(name="bn2")(y, train) + past)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 (with the stride) and 1x1 to four times the features, beside a shortcut."""

    features: int
    stride: int = 1
    shortcut: Callable[..., Callable[[Array, bool], Array]] = Projection
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, norm = partial(_conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        y = conv(self.features, (1, 1), name="conv1")(x)
        y = relu(norm(name="bn1")(y, train))
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = conv(4 * self.features, (1, 1), name="conv3")(relu(norm(name="bn2")(y, train)))
        past = self.shortcut(4 * self.features, self.stride, self.dtype, name="downsample")(x, train)
        return relu(norm(name="bn3")(y, train) + past)


def imagenet_stem(x: Array, width: int, train: bool, dtype: Any = None) -> Array:
    """A 7x7 convolution and a 3x3 max-pooling, both of stride 2."""
    x = _conv(width, (7, 7), strides=2, padding=3, dtype=dtype, name="conv1")(x)
    return max_pool(relu(BatchNorm(dtype=dtype, name="bn1")(x, train)), (3, 3), (2, 2), ((1, 1), (1, 1)))


def cifar_stem(x: Array, width: int, train: bool, dtype: Any = None) -> Array:
    """A 3x3 convolution that keeps the size, for images of 32x32."""
    x = _conv(width, (3, 3), padding=1, dtype=dtype, name="conv1")(x)
    return relu(BatchNorm(dtype=dtype, name="bn1")(x, train))


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over places, one dense layer.

    The first block of every stage but the first halves the image, in its 3x3 convolution; each stage doubles the
    features.

    Attributes:
      stages: blocks in each stage.
      block: `BasicBlock` or `Bottleneck`.
      classes: number of logits.
      width: features of the stem and of the 3x3 convolutions of the first stage; 64 as published.
      stem: `imagenet_stem` or `cifar_stem`.
      shortcut: `Projection`, `Padded`, or `NoShortcut` for a plain network of as many layers.
      remat: keep only each block's input for the backward pass.
      dtype: of the computation.

    He et al. 2016, https://arxiv.org/abs/1512.03385.

    >>> import jax
    >>> net = resnet18(10, width=8, stem=cifar_stem)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    stages: Sequence[int]
    block: type[nn.Module]
    classes: int = 1000
    width: int = 64
    stem: Callable[..., Array] = imagenet_stem
    shortcut: Callable[..., Callable[[Array, bool], Array]] = Projection
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block = partial(remat_if(self.remat, self.block), shortcut=self.shortcut, dtype=self.dtype)
        x = self.stem(x, self.width, train, self.dtype)
        for stage, blocks in enumerate(self.stages, start=1):
            for number in range(blocks):
                stride = 2 if stage > 1 and number == 0 else 1
                x = block(self.width * 2 ** (stage - 1), stride, name=f"layer{stage}_{number}")(x, train)
        return Dense(self.classes, dtype=self.dtype, name="fc")(jnp.mean(x, axis=(1, 2)))


resnet18 = partial(ResNet, (2, 2, 2, 2), BasicBlock)
resnet34 = partial(ResNet, (3, 4, 6, 3), BasicBlock)
resnet50 = partial(ResNet, (3, 4, 6, 3), Bottleneck)
resnet101 = partial(ResNet, (3, 4, 23, 3), Bottleneck)
resnet152 = partial(ResNet, (3, 8, 36, 3), Bottleneck)


def cifar_resnet(layers: int, classes: int = 10, **settings: Any) -> ResNet:
    """The paper's networks of ``6 n + 2`` layers for images of 32x32: three stages of 16, 32 and 64 features, option A.

    0.27, 0.46, 0.66, 0.85 and 1.7 million parameters for 20, 32, 44, 56 and 110 layers.

    Raises:
      ValueError: for another number of layers.

    >>> cifar_resnet(20).stages
    (3, 3, 3)
    """
    blocks, rest = divmod(layers - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"these networks have 6 n + 2 layers, 8 or more, got layers={layers}")
    forms: dict[str, Any] = {"width": 16, "stem": cifar_stem, "shortcut": Padded}
    return ResNet((blocks,) * 3, BasicBlock, classes, **{**forms, **settings})
