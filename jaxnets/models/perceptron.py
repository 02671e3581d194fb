"""The perceptron: one layer of threshold units."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Dense, flatten, in_turn, threshold
from jaxnets.types import Array


class Perceptron(nn.Module):
    """``unit(x W + b)``: one layer of units, threshold units unless another is given.

    Their outputs are zero or one; `layers.identity` gives the weighted sums themselves, whose order is finer. Threshold
    units are trained by the squared error of their outputs, whose slopes are Rosenblatt's rule: by the cross-entropy,
    for which zero and one are almost the same, they never rest.

    Attributes:
      classes: number of units.
      unit: any function of an array; see `layers`.
      remat: keep only the input for the backward pass.
      dtype: of the computation.

    Rosenblatt 1958, The perceptron: a probabilistic model for information storage and organization in the brain.

    >>> import jax, jax.numpy as jnp
    >>> set(Perceptron(3).init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].ravel().tolist()) <= {0.0, 1.0}
    True
    """

    classes: int = 10
    unit: Callable[[Array], Array] = threshold
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def output(x: Array) -> Array:
            return self.unit(Dense(self.classes, dtype=self.dtype)(x))

        return in_turn(self, self.remat, flatten(x), output=output)
