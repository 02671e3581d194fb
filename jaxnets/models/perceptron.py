"""The perceptron: one layer of threshold units."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import flatten, threshold
from jaxnets.types import Array


class Perceptron(nn.Module):
    """``unit(x W + b)``: one layer of units, threshold units unless another is given.

    Their outputs are zero or one; `layers.identity` gives the weighted sums themselves, whose order is finer.

    Attributes:
      classes: number of units.
      unit: any function of an array; see `layers`.
      dtype: of the computation.

    Rosenblatt 1958, The perceptron: a probabilistic model for information storage and organization in the brain.

    >>> import jax, jax.numpy as jnp
    >>> set(Perceptron(3).init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].ravel().tolist()) <= {0.0, 1.0}
    True
    """

    classes: int = 10
    unit: Callable[[Array], Array] = threshold
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.unit(nn.Dense(self.classes, dtype=self.dtype)(flatten(x)))
