"""Random arrays, drawn as one row: the same numbers, from programs that compile in half the time.

XLA compiles an array of random numbers the slower the more axes it has, and an attack is compiled for every network.
And keys by which rows draw for themselves.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxnets.types import Array


def drawn(draw: Callable[..., Array], key: Array, shape: tuple[int, ...], *settings: Any) -> Array:
    """``draw(key, shape, *settings)`` for a function of `jax.random`.

    >>> print(drawn(jax.random.uniform, jax.random.key(0), (2, 3)).shape)
    (2, 3)
    """
    return draw(key, (math.prod(shape),), *settings).reshape(shape)


def is_threefry(key: Array) -> bool:
    """Whether ``jax.vmap`` over such keys draws from each: of ``rbg`` and others it draws all from the first."""
    return str(jax.random.key_impl(key)) == "threefry2x32"


def threefry(key: Array) -> Array:
    """The key, or one of that kind made of it; or keys ``[...]``.

    >>> key = jax.random.key(0, impl="rbg")
    >>> is_threefry(key), is_threefry(threefry(key))
    (False, True)
    """
    if is_threefry(key):
        return key
    words = jax.random.key_data(key)
    made = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    for place in range(2, words.shape[-1]):
        made = jax.numpy.vectorize(jax.random.fold_in)(made, words[..., place])
    return made
