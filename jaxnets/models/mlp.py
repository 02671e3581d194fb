"""Multilayer perceptron."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import flatten
from jaxnets.types import Array


class MLP(nn.Module):
    """Fully connected layers with an activation between them: ``z = W_n a(... a(W_1 x + b_1) ...) + b_n``.

    Attributes:
      widths: units of each hidden layer; none for a linear classifier.
      classes: number of logits.
      activation: any function of an array.
      dtype: of the computation.

    >>> import jax, jax.numpy as jnp
    >>> MLP((20, 10)).init_with_output(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
    (2, 10)
    """

    widths: Sequence[int] = (256, 256)
    classes: int = 10
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = flatten(x)
        for width in self.widths:
            x = self.activation(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x)
