"""The small convolutional network of fast adversarial training on MNIST."""

from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Conv, flatten
from jaxnets.types import Array


class SmallCNN(nn.Module):
    """Two convolutions of 4x4 with stride 2 (16, 32 channels), 100 dense units, ReLU.

    166,406 parameters on 28x28x1. The published weights start at PyTorch's default, uniform in ``+-1 / sqrt(fan_in)``;
    here, as in the rest of Flax, at LeCun's normal with zero biases, unless given.

    Attributes:
      classes: number of logits.
      kernel_init, bias_init: initialisers of all layers.
      dtype: of the computation.

    Wong et al. 2020, https://arxiv.org/abs/2001.03994.

    >>> import jax, jax.numpy as jnp
    >>> SmallCNN().init_with_output(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))[0].shape
    (2, 10)
    """

    classes: int = 10
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        settings: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init, "dtype": self.dtype}
        for features in (16, 32):
            x = nn.relu(Conv(features, (4, 4), strides=2, padding=1, **settings)(x))
        x = nn.relu(nn.Dense(100, **settings)(flatten(x)))
        return nn.Dense(self.classes, **settings)(x)
