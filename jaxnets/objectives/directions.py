"""Directions of gradients, without a ball or a box."""

import jax.numpy as jnp

from jaxnets.threats import L2
from jaxnets.types import Array

_FREE = L2(1.0, -jnp.inf, jnp.inf)


def unit(vector: Array) -> Array:
    """``v / |v|`` at any scale of ``v``, zero where ``v`` is zero.

    >>> print(unit(jnp.array([3e-30, 4e-30])))
    [0.6 0.8]
    """
    return _FREE.direction(vector, vector)
