"""The radial basis function network: a layer of Gaussian bumps, and weighted sums of them."""

from typing import Any

import flax.linen as nn

from jaxnets.models.layers import Dense, RadialBasis, flatten, in_turn
from jaxnets.types import Array


class RBFNetwork(nn.Module):
    """``W exp(-|x - c_k|^2 / (2 sigma_k^2)) + b``: one hidden layer of `layers.RadialBasis`, and a dense one.

    Centres are best begun at training rows, for example by ``centers_init=lambda key, shape: rows``.

    Attributes:
      centers: number of hidden units.
      classes: number of logits.
      width: every ``sigma_k`` at first; by the distance between centres unless given, see `layers.RadialBasis`.
      centers_init: of the centres ``[centers, N]``; uniform in the box [0, 1] unless given.
      remat: keep only each layer's input for the backward pass.
      dtype: of the computation; distances are computed in single precision at least.

    Broomhead and Lowe 1988, Multivariable functional interpolation and adaptive networks.

    >>> import jax, jax.numpy as jnp
    >>> jax.eval_shape(RBFNetwork(20).init_with_output, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
    (2, 10)
    """

    centers: int = 100
    classes: int = 10
    width: float | None = None
    centers_init: nn.initializers.Initializer = nn.initializers.uniform(1.0)
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def hidden(x: Array) -> Array:
            return RadialBasis(self.centers, self.centers_init, self.width, self.dtype)(x)

        x = in_turn(self, self.remat, flatten(x), hidden=hidden)
        # From zero, sums of bumps are learnt before the bumps are moved.
        return Dense(self.classes, kernel_init=nn.initializers.zeros, dtype=self.dtype)(x)
