"""Multilayer perceptron."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Dense, flatten, in_turn, relu
from jaxnets.types import Array


class MLP(nn.Module):
    """Fully connected layers with an activation between them: ``z = W_n a(... a(W_1 x + b_1) ...) + b_n``.

    The hidden layers' activations are ``hidden1``, ``hidden2``, ...

    Attributes:
      widths: units of each hidden layer; none for a linear classifier.
      classes: number of logits.
      activation: any function of an array.
      remat: keep only each layer's input for the backward pass.
      dtype: of the computation.

    >>> import jax, jax.numpy as jnp
    >>> jax.eval_shape(MLP((20, 10)).init_with_output, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
    (2, 10)
    """

    widths: Sequence[int] = (256, 256)
    classes: int = 10
    activation: Callable[[Array], Array] = relu
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def hidden(x: Array, width: int) -> Array:
            return self.activation(Dense(width, dtype=self.dtype)(x))

        x = flatten(x)
        for number, width in enumerate(self.widths, start=1):
            x = in_turn(self, self.remat, x, **{f"hidden{number}": partial(hidden, width=width)})
        return Dense(self.classes, dtype=self.dtype)(x)
