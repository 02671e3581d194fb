"""Where an attack starts: functions ``(keys[B], threat, x[B, ...]) -> x_0[B, ...]``."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxnets.threats import Threat, each_row
from jaxnets.types import Array

Start = Callable[[Array, Threat, Array], Array]


def at_clean(keys: Array, threat: Threat, x: Array) -> Array:
    """The clean point."""
    return x


def uniform_unclipped(keys: Array, threat: Threat, x: Array) -> Array:
    """Uniform in the ball; the first gradient may be taken outside the box.

    The published MNIST code of Wong et al. 2020 starts so, their CIFAR-10 code as in `uniform`.
    """
    return each_row(lambda threat, key, x: threat.sample(key, x), threat, keys, x)


def uniform(keys: Array, threat: Threat, x: Array) -> Array:
    """Uniform in the ball, then cut to the box: never further from ``x`` than the sample."""
    return jnp.clip(uniform_unclipped(keys, threat, x), threat.lower, threat.upper)
