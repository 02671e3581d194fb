"""The convolutional network of the MNIST adversarial examples challenge."""

from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Conv, flatten, max_pool
from jaxnets.types import Array


class MadryCNN(nn.Module):
    """Convolutions of 5x5 with 32 and 64 channels, each with 2x2 max-pooling, then 1024 dense units, ReLU.

    3,274,634 parameters on 28x28x1. Kernels start at a normal of deviation 0.1 cut at two deviations, biases at 0.1, as
    published.

    Attributes:
      classes: number of logits.
      dtype: of the computation.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083.

    >>> import jax, jax.numpy as jnp
    >>> MadryCNN().init_with_output(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))[0].shape
    (2, 10)
    """

    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        settings: dict[str, Any] = {
            "kernel_init": nn.initializers.truncated_normal(0.1),
            "bias_init": nn.initializers.constant(0.1),
            "dtype": self.dtype,
        }
        for features in (32, 64):
            x = max_pool(nn.relu(Conv(features, (5, 5), **settings)(x)))
        x = nn.relu(nn.Dense(1024, **settings)(flatten(x)))
        return nn.Dense(self.classes, **settings)(x)
