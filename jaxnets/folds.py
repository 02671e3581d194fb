"""Sums, largest entries and lengths of one example of floats, in an order that every backend vectorises.

XLA's CPU backend reduces an array to one number entry by entry, each waiting for the one before: in attacks on small
networks this costs more than the gradients. Folding the array onto itself first is up to twenty times as fast.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxnets.types import Array

_LANES = 16


def total(values: Array) -> Array:
    """The sum over all axes, of the type of ``values``.

    >>> print(total(jnp.arange(35).reshape(5, 7)))
    595
    """
    return jnp.sum(_folded(jnp.add, values), dtype=values.dtype)


def largest(values: Array) -> Array:
    """The largest entry over all axes, NaN where one is; there must be one.

    >>> print(largest(jnp.arange(35).reshape(5, 7)))
    34
    """
    return jnp.max(_folded(jnp.maximum, values))


def length(values: Array) -> Array:
    """The Euclidean length over all axes at any scale, with gradient zero at zero.

    >>> print(length(jnp.array([[3e30], [4e30]])))
    5e+30
    """
    most = jax.lax.stop_gradient(largest(jnp.abs(values)))
    scale = jnp.where(most > 0, most, 1)
    return scale * root(total((values / scale) ** 2))


def root(square: Array) -> Array:
    """Square root, entry by entry, whose gradient at zero is zero.

    >>> print(root(jnp.array([4.0, 0.0])))
    [2. 0.]
    """
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _folded(combine: Callable[[Array, Array], Array], values: Array) -> Array:
    """Fewer entries of the same sum, or of the same largest."""
    flat = values.ravel()
    whole = flat.size - flat.size % _LANES
    lanes = flat[:whole].reshape(_LANES, -1)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = combine(lanes[:half], lanes[half:])
    return jnp.concatenate([lanes[0], flat[whole:]])
