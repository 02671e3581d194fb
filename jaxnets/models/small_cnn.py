"""The small convolutional network of fast adversarial training on MNIST."""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Conv, Dense, flatten, in_turn, relu
from jaxnets.types import Array


class SmallCNN(nn.Module):
    """Two convolutions of 4x4 with stride 2 (16, 32 channels), 100 dense units, ReLU.

    166,406 parameters on 28x28x1. The published weights start at PyTorch's default, uniform in ``+-1 / sqrt(fan_in)``;
    here, as in the rest of Flax, at LeCun's normal with zero biases, unless given.

    Its activations after ReLU are ``conv1``, ``conv2`` and ``fc1``.

    Attributes:
      classes: number of logits.
      kernel_init, bias_init: initialisers of all layers.
      remat: keep only each layer's input for the backward pass.
      dtype: of the computation.

    Wong et al. 2020, https://arxiv.org/abs/2001.03994.

    >>> import jax, jax.numpy as jnp
    >>> jax.eval_shape(SmallCNN().init_with_output, jax.random.key(0), jnp.zeros((2, 28, 28, 1)))[0].shape
    (2, 10)
    """

    classes: int = 10
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        settings: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init, "dtype": self.dtype}
        layer = partial(in_turn, self, self.remat)
        conv = partial(Conv, kernel_size=(4, 4), strides=2, padding=1, **settings)
        x = layer(x, conv1=lambda x: relu(conv(16)(x)))
        x = layer(x, conv2=lambda x: relu(conv(32)(x)))
        x = layer(flatten(x), fc1=lambda x: relu(Dense(100, **settings)(x)))
        return Dense(self.classes, **settings)(x)
