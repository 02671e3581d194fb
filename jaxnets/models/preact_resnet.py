"""Residual networks whose blocks normalise first, and leave the shortcut alone (He et al. 2016, the second paper)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import BatchNorm, Conv, Dense, he, relu, remat_if
from jaxnets.models.resnet import Padded, cifar_stem, imagenet_stem
from jaxnets.types import Array

he_conv = partial(Conv, use_bias=False, kernel_init=he)


def normalized_relu(x: Array, train: bool, dtype: Any = None) -> Array:
    """Batch norm and ReLU: how a block begins."""
    return relu(BatchNorm(dtype=dtype, name="bn1")(x, train))


def as_it_is(x: Array, train: bool, dtype: Any = None) -> Array:
    """The input: how the first block begins after a stem that ends in batch norm and ReLU, its shortcut thus too."""
    return x


def projected(x: Array, active: Array, features: int, stride: int, dtype: Any = None) -> Array:
    """The input where its shape is right, else a 1x1 convolution of ``active``, what a block's first ReLU gives."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return he_conv(features, (1, 1), strides=stride, dtype=dtype, name="shortcut")(active)


def padded(x: Array, active: Array, features: int, stride: int, dtype: Any = None) -> Array:
    """The input as `Padded` has it: no parameters."""
    return Padded(features, stride, dtype, name="shortcut")(x, True)


class PreActBlock(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice, beside a shortcut.

    Attributes:
      features: of both convolutions.
      stride: of the first.
      dropout: share of what the second ReLU gives that a training step leaves out.
      dtype: of the computation.
      begin: `normalized_relu` or `as_it_is`.
      shortcut: `projected` or `padded`.
    """

    features: int
    stride: int = 1
    dropout: float = 0.0
    dtype: Any = None
    begin: Callable[..., Array] = normalized_relu
    shortcut: Callable[..., Array] = projected

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, norm = partial(he_conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        active = self.begin(x, train, self.dtype)
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(active)
        y = nn.Dropout(self.dropout, deterministic=not train)(relu(norm(name="bn2")(y, train)))
        y = conv(self.features, (3, 3), padding=1, name="conv2")(y)
        return self.shortcut(x, active, self.features, self.stride, self.dtype) + y


class PreActBottleneck(nn.Module):
    """Batch norm, ReLU and a convolution, of 1x1, 3x3 (with the stride) and 1x1 to four times the features.

    Attributes: those of `PreActBlock`; ``features`` are of the first two convolutions, dropout comes before the last.
    """

    features: int
    stride: int = 1
    dropout: float = 0.0
    dtype: Any = None
    begin: Callable[..., Array] = normalized_relu
    shortcut: Callable[..., Array] = projected

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, norm = partial(he_conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        active = self.begin(x, train, self.dtype)
        y = conv(self.features, (1, 1), name="conv1")(active)
        y = relu(norm(name="bn2")(y, train))
        y = conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(relu(norm(name="bn3")(y, train)))
        y = conv(4 * self.features, (1, 1), name="conv3")(y)
        return self.shortcut(x, active, 4 * self.features, self.stride, self.dtype) + y


def convolution_stem(x: Array, width: int, train: bool, dtype: Any = None) -> Array:
    """A 3x3 convolution that keeps the size, for images of 32x32, and nothing after it."""
    return he_conv(width, (3, 3), padding=1, dtype=dtype, name="conv1")(x)


class PreActResNet(nn.Module):
    """A stem, stages of blocks that normalise first, batch norm, ReLU, the mean over places, one dense layer.

    The first block of every stage but the first halves the image, in its 3x3 convolution (in the authors' networks for
    images of 32x32 the bottleneck's first convolution does); each stage doubles the features.

    Two forms. `preact_resnet18`, `preact_resnet34` and `preact_resnet50` are those that the literature on adversarial
    training has for images of 32x32: 11,172,170, 21,280,330 and 23,513,162 parameters with 10 classes. The shortcut of
    their very first block carries what the stem's convolution gives. In the paper's that block comes after batch norm
    and ReLU, and so does its shortcut: `preact_resnet110` (1,727,962 parameters, shortcuts without any),
    `preact_resnet164` (1,703,258) and `preact_resnet1001` (10,327,706; the paper's 10.2 million are without batch norm)
    for images of 32x32, `preact_resnet200` (64,666,152 with 1000 classes) for 224x224. Where the first block changes
    the number of features, as bottlenecks do, its shortcut is of the first ReLU in both forms.

    Attributes:
      stages: blocks in each stage.
      block: `PreActBlock` or `PreActBottleneck`.
      classes: number of logits.
      width: features of the stem and of the 3x3 convolutions of the first stage.
      stem: `convolution_stem`; or `cifar_stem` or `imagenet_stem`, which end in batch norm and ReLU.
      begin: of the first block: `normalized_relu`, or `as_it_is` after those two stems.
      shortcut: `projected`, or `padded`.
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
    stem: Callable[..., Array] = convolution_stem
    begin: Callable[..., Array] = normalized_relu
    shortcut: Callable[..., Array] = projected
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        block = partial(remat_if(self.remat, self.block), dtype=self.dtype, shortcut=self.shortcut)
        x, begin = self.stem(x, self.width, train, self.dtype), self.begin
        for stage, blocks in enumerate(self.stages, start=1):
            for number in range(blocks):
                stride = 2 if stage > 1 and number == 0 else 1
                x = block(self.width * 2 ** (stage - 1), stride, begin=begin, name=f"layer{stage}_{number}")(x, train)
                begin = normalized_relu
        x = relu(BatchNorm(dtype=self.dtype, name="bn")(x, train))
        return Dense(self.classes, dtype=self.dtype, name="linear")(jnp.mean(x, axis=(1, 2)))


preact_resnet18 = partial(PreActResNet, (2, 2, 2, 2), PreActBlock)
preact_resnet34 = partial(PreActResNet, (3, 4, 6, 3), PreActBlock)
preact_resnet50 = partial(PreActResNet, (3, 4, 6, 3), PreActBottleneck)

_published = partial(PreActResNet, begin=as_it_is)
_thin = partial(_published, width=16, stem=cifar_stem)
preact_resnet110 = partial(_thin, (18, 18, 18), PreActBlock, shortcut=padded)
preact_resnet164 = partial(_thin, (18, 18, 18), PreActBottleneck)
preact_resnet1001 = partial(_thin, (111, 111, 111), PreActBottleneck)
preact_resnet200 = partial(_published, (3, 24, 36, 3), PreActBottleneck, classes=1000, stem=imagenet_stem)
