"""What minimum-norm attacks share: steps that shrink along a cosine and never stand still, and what success is.

Of a model that draws they keep the smallest perturbation that succeeded in the draw in which it was looked at.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.ranking import Nearest, nearer
from jaxnets.draws import drawn
from jaxnets.threats import L2, Threat, each_row, sizes
from jaxnets.types import Array

_HALVINGS = 10


def box_width(name: str, threat: Threat, unless: str) -> float:
    """The unit of length of the published settings, which are for data in [0, 1].

    Raises:
      ValueError: where the box is not finite.
    """
    width = threat.upper - threat.lower
    if not 0 < width < float("inf"):
        raise ValueError(f"{name} needs a finite box, got [{threat.lower}, {threat.upper}]: {unless}")
    return width


def wide_a_row(value: Any, x: Array) -> Array:
    """One value a row, ``[B]``, in at least single precision."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32)), len(x))


def spread(value: Array, x: Array) -> Array:
    """``value[B]`` in the shape that multiplies rows ``x[B, ...]``, in their type."""
    return value.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def annealed(first: Any, last: Any, step: Array, steps: int) -> Array:
    """From ``first`` at step 0 to ``last`` at ``steps``: ``last + (first - last) (1 + cos(pi step / steps)) / 2``."""
    return last + (first - last) * (1 + jnp.cos(jnp.pi * step / steps)) / 2


def finite(gradient: Array) -> Array:
    """The gradient, zero in all rows where a part of it is not finite."""
    return jnp.where(jnp.isfinite(gradient).all(axis=range(1, gradient.ndim), keepdims=True), gradient, 0)


def random_directions(keys: Array, x: Array) -> Array:
    """One normal direction a row, ``[B, ...]``: where a row without a gradient goes."""
    return jax.vmap(lambda key, row: drawn(jax.random.normal, key, row.shape, row.dtype))(keys, x)


def unit_step(gradient: Array, otherwise: Array, threat: Threat, x_t: Array) -> Array:
    """``g / |g|_2`` of every row, without the coordinates in which ``x_t`` would leave the threat's box.

    Along ``otherwise`` where the gradient is zero. A box without bounds leaves the gradient as it is.
    """
    zero = (gradient == 0).all(axis=range(1, x_t.ndim), keepdims=True)
    euclidean = L2(0.0, threat.lower, threat.upper)
    return each_row(L2.direction, euclidean, jnp.where(zero, otherwise, gradient), x_t)


def largest_sizes(threat: Threat, x: Array) -> Array:
    """The size of the largest perturbation that the box allows each row, ``[B]``, in at least single precision."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    furthest = jnp.maximum(wide - threat.lower, threat.upper - wide)
    return sizes(threat, furthest, jnp.zeros_like(wide))


def shortened(
    best: Nearest, x: Array, succeeds: Callable[[Array, Array], Array], distance: Callable[[Array], Array]
) -> Nearest:
    """The nearest success that bisection meets on the segment from each clean row to the one found.

    Args:
      best: what was found so far.
      x: clean rows ``[B, ...]``.
      succeeds: ``(number of the halving, points[B, ...]) -> bool[B]``; one forward pass each.
      distance: ``points -> [B]`` from the clean rows.
    """
    # A row for which nothing was found has nothing to shorten.
    far, some = best.x, jnp.isfinite(best.size)

    def halve(halving, carry):
        low, high, best = carry
        middle = (low + high) / 2
        point = x + spread(middle, x) * (far - x)
        success = succeeds(halving, point)
        best = nearer(best, point, success & some, distance(point))
        return jnp.where(success, low, middle), jnp.where(success, middle, high), best

    bracket = jnp.zeros(len(x), x.dtype), jnp.ones(len(x), x.dtype)
    return jax.lax.fori_loop(0, _HALVINGS, halve, (*bracket, best))[2]
