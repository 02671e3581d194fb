"""GoogLeNet: nine modules of parallel convolutions, and two heads that help to train the first of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxnets.models.layers import (
    BatchNorm,
    ConvBlock,
    Dense,
    adaptive_avg_pool,
    avg_pool,
    flatten,
    identity,
    local_response_norm,
    max_pool,
    relu,
    remat_if,
)
from jaxnets.types import Array

# Features of each module: 1x1; 3x3 and the 1x1 before it; 5x5 and the 1x1 before it; the 1x1 after pooling.
_MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""The paper's table 1."""

_HEADS = {"4a": "aux1", "4d": "aux2"}


class Form(NamedTuple):
    """In what the published network (`PUBLISHED`) and the one of torchvision's weights (`WITH_BATCH_NORM`) differ.

    Attributes:
      norm: makes a normalisation after each convolution; where there is none the stem normalises across channels.
      kernel: side of the largest kernels of a module.
      last_pool: side of the window of the pooling between the modules 4e and 5a.
      head_pool: what an auxiliary head sees of a map: 4x4 places, of the published one where images are 224x224.
    """

    norm: Callable[..., nn.Module] | None
    kernel: int
    last_pool: int
    head_pool: Callable[[Array], Array]


def _mean_of_windows(x: Array) -> Array:
    """Over 5x5 places, every three."""
    if min(x.shape[1:3]) < 5:
        raise ValueError(
            f"the heads of the published GoogLeNet see windows of 5x5 in maps of {x.shape[1]}x{x.shape[2]}: initialise "
            "and train it with images of 79x79 or more, or take GoogLeNet.with_batch_norm or .small"
        )
    return avg_pool(x, (5, 5), (3, 3))


PUBLISHED = Form(None, 5, 3, _mean_of_windows)
WITH_BATCH_NORM = Form(partial(BatchNorm, eps=1e-3), 3, 2, partial(adaptive_avg_pool, size=(4, 4)))


def _pool(x: Array, window: int = 3) -> Array:
    """Half of the size, rounded down by windows of 3x3 and up by those of 2x2."""
    return max_pool(x, (window, window), (2, 2), ((0, 1), (0, 1)))


def _scaled(features: int, width: float) -> int:
    return max(int(features * width), 1)


def large_stem(x: Array, width: float, form: Form, train: bool, dtype: Any = None) -> Array:
    """Convolutions of 7x7, 1x1 and 3x3 and two poolings to an eighth of the size."""
    conv, across = partial(ConvBlock, norm=form.norm, dtype=dtype), identity if form.norm else local_response_norm
    x = conv(_scaled(64, width), 7, 2, 3, after=lambda x: across(_pool(x)), name="conv1")(x, train)
    x = conv(_scaled(64, width), 1, name="conv2")(x, train)
    return conv(_scaled(192, width), 3, padding=1, after=lambda x: _pool(across(x)), name="conv3")(x, train)


def small_stem(x: Array, width: float, form: Form, train: bool, dtype: Any = None) -> Array:
    """A 3x3 convolution that keeps the size, for images of 32x32."""
    return ConvBlock(_scaled(192, width), 3, padding=1, norm=form.norm, dtype=dtype, name="conv3")(x, train)


class Inception(nn.Module):
    """Convolutions of 1x1, 3x3 and 5x5 and a 3x3 pooling side by side, their features one after the other.

    Attributes:
      features: as in a row of the paper's table 1.
      norm, kernel: as in `Form`.
      dtype: of the computation.
    """

    features: tuple[int, ...]
    norm: Callable[..., nn.Module] | None = None
    kernel: int = 5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def conv(name: str, x: Array, features: int, kernel: int) -> Array:
            settings: dict[str, Any] = {"norm": self.norm, "dtype": self.dtype, "name": name}
            return ConvBlock(features, kernel, padding=kernel // 2, **settings)(x, train)

        one, before_three, three, before_five, five, after_pool = self.features
        paths = [
            conv("branch1", x, one, 1),
            conv("branch2_1", conv("branch2_0", x, before_three, 1), three, 3),
            conv("branch3_1", conv("branch3_0", x, before_five, 1), five, self.kernel),
            conv("branch4_1", max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))), after_pool, 1),
        ]
        return jnp.concatenate(paths, axis=-1)


class AuxiliaryHead(nn.Module):
    """Logits from the middle of the network: mean pooling, a 1x1 convolution, two dense layers with dropout.

    Attributes:
      classes: number of logits.
      features: of the convolution.
      hidden: units of the first dense layer.
      form: as in `GoogLeNet`.
      dtype: of the computation.
    """

    classes: int
    features: int
    hidden: int
    form: Form
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = ConvBlock(self.features, 1, norm=self.form.norm, dtype=self.dtype, name="conv")(
            self.form.head_pool(x), train
        )
        x = relu(Dense(self.hidden, dtype=self.dtype, name="fc1")(flatten(x)))
        x = nn.Dropout(0.7, deterministic=not train)(x)
        return Dense(self.classes, dtype=self.dtype, name="fc2")(x)


class GoogLeNet(nn.Module):
    """A stem of three convolutions, nine `Inception` modules, the mean over places, one dense layer.

    6,998,552 parameters with 1000 classes, without the two auxiliary heads. Those, ``aux1`` and ``aux2``, give logits
    of their own from the modules 4a and 4d: they are among the network's activations, and are computed for these and at
    initialisation alone. The published ones take images of one size, that of initialisation; all else takes any size.
    `GoogLeNet.with_batch_norm` is the form of which torchvision has weights.

    Attributes:
      classes: number of logits.
      width: factor of every number of features and of hidden units, rounded down; 1 as published.
      form: `PUBLISHED`, `WITH_BATCH_NORM` or another `Form`.
      stem: `large_stem`, or `small_stem` for images of 32x32.
      remat: keep only each module's input for the backward pass.
      dtype: of the computation.

    Raises:
      ValueError: where images are too small for the heads, at initialisation and where activations are wanted.

    Szegedy et al. 2015, https://arxiv.org/abs/1409.4842.

    >>> import jax
    >>> net = GoogLeNet.small(width=1 / 16)
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))[0].shape
    (2, 10)
    """

    classes: int = 1000
    width: float = 1.0
    form: Form = PUBLISHED
    stem: Callable[..., Array] = large_stem
    remat: bool = False
    dtype: Any = None

    @classmethod
    def with_batch_norm(cls, classes: int = 1000, **settings: Any) -> "GoogLeNet":
        """As in torchvision: batch norm, 3x3 where the paper has 5x5; 6,624,904 parameters without the heads."""
        return cls(classes, form=WITH_BATCH_NORM, **settings)

    @classmethod
    def small(cls, classes: int = 10, **settings: Any) -> "GoogLeNet":
        """For images of 32x32, with batch norm."""
        return cls(classes, form=WITH_BATCH_NORM, stem=small_stem, **settings)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        module, form = remat_if(self.remat, Inception), self.form
        x = self.stem(x, self.width, form, train, self.dtype)
        for name, features in _MODULES.items():
            if name in ("4a", "5a"):
                x = _pool(x, 3 if name == "4a" else form.last_pool)
            scaled = tuple(_scaled(number, self.width) for number in features)
            x = module(scaled, form.norm, form.kernel, self.dtype, name=f"inception{name}")(x, train)
            if name in _HEADS and self._heads_are_wanted():
                sizes = self.classes, _scaled(128, self.width), _scaled(1024, self.width)
                AuxiliaryHead(*sizes, form, self.dtype, name=_HEADS[name])(x, train)
        x = nn.Dropout(0.4, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return Dense(self.classes, dtype=self.dtype, name="fc")(x)

    def _heads_are_wanted(self) -> bool:
        return self.is_initializing() or self.is_mutable_collection("intermediates")
