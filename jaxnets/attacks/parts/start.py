"""Where an attack starts: functions ``(keys[B], threat, x[B, ...]) -> x_0[B, ...]``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.draws import drawn
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


def gaussian(sigma: Any = 1e-3) -> Start:
    """The clean point with noise ``N(0, sigma^2)`` on every coordinate; it may leave ball and box.

    So start the attacks of TRADES and MART, whose authors take 0.001: at the clean point `losses.kl` has no gradient.

    >>> import jaxnets as jn
    >>> x = jnp.full((2, 3), 0.5)
    >>> abs(gaussian(0.0)(jax.random.split(jax.random.key(0)), jn.Linf(0.1), x) - x).max()
    Array(0., dtype=float32)
    """
    return Partial(_noisy, sigma)


def random_signs(size: Any) -> Start:
    """The clean point moved by ``+-size`` in every coordinate, cut to the box.

    With ``fgsm(start=random_signs(epsilon / 2), step_size=epsilon / 2)`` it is RAND+FGSM: Tramer et al. 2018,
    https://arxiv.org/abs/1705.07204.

    >>> import jaxnets as jn
    >>> x = jnp.zeros((1, 4))
    >>> print(random_signs(0.1)(jax.random.split(jax.random.key(1), 1), jn.Linf(0.2), x))
    [[0.  0.1 0.  0.1]]
    """
    return Partial(_signed, size)


def _noisy(sigma: Any, keys: Array, threat: Threat, x: Array) -> Array:
    return (x + sigma * _by_row(jax.random.normal, keys, x)).astype(x.dtype)


def _signed(size: Any, keys: Array, threat: Threat, x: Array) -> Array:
    moved = x + size * _by_row(jax.random.rademacher, keys, x)
    return jnp.clip(moved, threat.lower, threat.upper).astype(x.dtype)


def _by_row(draw: Callable[..., Array], keys: Array, x: Array) -> Array:
    return jax.vmap(lambda key, row: drawn(draw, key, row.shape, row.dtype))(keys, x)
