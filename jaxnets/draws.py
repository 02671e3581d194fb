"""Random arrays, drawn as one row: the same numbers, from programs that compile in half the time.

XLA compiles an array of random numbers the slower the more axes it has, and an attack is compiled for every network.
"""

import math
from collections.abc import Callable
from typing import Any

from jaxnets.types import Array


def drawn(draw: Callable[..., Array], key: Array, shape: tuple[int, ...], *settings: Any) -> Array:
    """``draw(key, shape, *settings)`` for a function of `jax.random`.

    >>> import jax
    >>> print(drawn(jax.random.uniform, jax.random.key(0), (2, 3)).shape)
    (2, 3)
    """
    return draw(key, (math.prod(shape),), *settings).reshape(shape)
