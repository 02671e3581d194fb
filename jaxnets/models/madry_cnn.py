"""The convolutional network of the MNIST adversarial examples challenge."""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Conv, Dense, flatten, in_turn, max_pool, relu
from jaxnets.types import Array


class MadryCNN(nn.Module):
    """Convolutions of 5x5 with 32 and 64 channels, each with 2x2 max-pooling, then 1024 dense units, ReLU.

    3,274,634 parameters on 28x28x1. Kernels start at a normal of deviation 0.1 cut at two deviations, biases at 0.1, as
    published.

    Its activations after ReLU and pooling are ``conv1``, ``pool1``, ``conv2``, ``pool2`` and ``fc1``.

    Attributes:
      classes: number of logits.
      remat: keep only each convolution's and dense layer's input for the backward pass.
      dtype: of the computation.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083.

    >>> import jax, jax.numpy as jnp
    >>> jax.eval_shape(MadryCNN().init_with_output, jax.random.key(0), jnp.zeros((2, 28, 28, 1)))[0].shape
    (2, 10)
    """

    classes: int = 10
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        settings: dict[str, Any] = {
            "kernel_init": nn.initializers.truncated_normal(0.1),
            "bias_init": nn.initializers.constant(0.1),
            "dtype": self.dtype,
        }
        layer, conv = partial(in_turn, self, self.remat), partial(Conv, kernel_size=(5, 5), **settings)
        x = layer(x, conv1=lambda x: relu(conv(32)(x)), pool1=max_pool)
        x = layer(x, conv2=lambda x: relu(conv(64)(x)), pool2=max_pool)
        x = layer(flatten(x), fc1=lambda x: relu(Dense(1024, **settings)(x)))
        return Dense(self.classes, **settings)(x)
