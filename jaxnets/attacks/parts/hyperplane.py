"""Where a classifier's boundary seems to be, by its linearisation, and the smallest step there inside the box."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.folds import largest, total
from jaxnets.losses import is_targeted, margin, targeted
from jaxnets.threats import L1, L2, Linf, Threat
from jaxnets.types import Array, LogitsFn, Loss

_DUAL: dict[type, Threat] = {Linf: L1(0.0), L2: L2(0.0), L1: Linf(0.0)}
_WANTED = targeted(margin)


class Hyperplane(NamedTuple):
    """The points ``z + delta`` with ``<normal, delta> = gap``, seen from one point ``z`` a row.

    Attributes:
      gap: how much a difference of logits has to rise, ``[B]`` (a scalar for one example); negative beyond the plane.
      normal: gradient of that difference, of the shape of ``z``.
    """

    gap: Array
    normal: Array


def check_norm(threat: Threat, name: str) -> None:
    """Raises ValueError unless steps to a hyperplane are known for the threat."""
    if type(threat) not in _DUAL:
        raise ValueError(f"{name} takes an Linf, L2 or L1 threat, got {threat!r}")


# Where the boundary seems to be: for a batch of rows.


def linearised(
    threat: Threat, loss: Loss, logits_fn: LogitsFn, x_t: Array, target: Array, others: Array
) -> tuple[Array, Hyperplane]:
    """The logits at ``x_t`` and the linearised boundary that an attack with the goal of ``loss`` has to cross.

    Untargeted: the nearest of those between ``target[B]`` and ``others[B, C]``, for one forward pass and ``C`` backward
    passes. Targeted: the one between ``target`` and the class that leads it, for one of each.
    """
    if is_targeted(loss):
        normal, logits = input_gradient(logits_fn, _WANTED, x_t, target)
        return logits, Hyperplane(_gap(_WANTED(logits, target), logits), normal)
    each = jax.vmap(boundary_to, in_axes=(None, None, None, 1), out_axes=(None, 0))
    logits, planes = each(logits_fn, x_t, target, others)
    nearest = jnp.argmin(jax.vmap(jax.vmap(partial(distance, threat)))(planes), axis=0)
    # Row by row: for one index of classes and rows every device would gather the rows of all.
    chosen = jax.vmap(lambda of_row, number: jax.tree.map(lambda leaf: leaf[number], of_row), in_axes=(1, 0))
    return logits, chosen(planes, nearest)


def boundary_to(logits_fn: LogitsFn, x_t: Array, target: Array, other: Array) -> tuple[Array, Hyperplane]:
    """The logits at ``x_t[B, ...]`` and the linearised boundary between ``target[B]`` and ``other[B]``.

    Beyond the plane ``other`` has the higher logit. One forward and one backward pass.
    """
    pair = jnp.stack([target, other], axis=1)
    normal, logits = input_gradient(logits_fn, _lead, x_t, pair)
    return logits, Hyperplane(_gap(_lead(logits, pair), logits), normal)


def _lead(logits: Array, pair: Array) -> Array:
    """How far the second class of ``pair[B, 2]`` leads the first."""
    first, second = (jnp.take_along_axis(logits, one, axis=1)[:, 0] for one in jnp.split(pair, 2, axis=1))
    return second - first


def _gap(lead: Array, logits: Array) -> Array:
    # A few rounding errors beyond the boundary: where the logits tie, the prediction may be the old one.
    return -lead + 4 * jnp.finfo(logits.dtype).eps * jnp.max(jnp.abs(logits), axis=1)


# How far it is and how to get there: for one example.


def distance(threat: Threat, plane: Hyperplane) -> Array:
    """Distance to a hyperplane, without the box: ``|gap| / |normal|_q`` with ``1/p + 1/q = 1``.

    Infinite where the normal is zero, or where anything is NaN.
    """
    length = _DUAL[type(threat)].size(plane.normal)
    ratio = jnp.abs(plane.gap) / jnp.where(length > 0, length, 1)
    return jnp.where((length > 0) & ~jnp.isnan(ratio), ratio, jnp.inf)


def seen_from(z: Array, plane: Hyperplane, x_t: Array) -> Hyperplane:
    """The hyperplane that was found at ``x_t``, seen from ``z``."""
    normal, offset = plane.normal.ravel(), (z - x_t).ravel()
    return plane._replace(gap=plane.gap - _dot(normal.astype(plane.gap.dtype), offset.astype(plane.gap.dtype)))


def step_to(threat: Threat, z: Array, plane: Hyperplane) -> Array:
    """The smallest step to a hyperplane inside the box.

    ``argmin |delta|_p`` over ``<normal, delta> = gap`` and ``lower <= z + delta <= upper``: coordinate ``i`` moves
    towards the plane by ``min(t, room_i)`` (Linf) or ``min(t |normal_i|, room_i)`` (L2) with the one ``t`` that closes
    the gap, or all the way to the box for the largest ``|normal_i|`` (L1). Where the box holds no point of the plane it
    is the step to the box's corner nearest to it; zero where the normal or the gap is zero or NaN.

    Args:
      threat: its norm and its box; epsilon has no part in it.
      z: where the step begins, inside the box.
      plane: seen from ``z``, with ``gap`` a scalar.

    >>> plane = Hyperplane(jnp.array(0.75), jnp.array([1.0, 1.0]))
    >>> print(step_to(Linf(0.0), jnp.array([0.75, 0.0]), plane))
    [0.25 0.5 ]
    """
    wide = jnp.promote_types(z.dtype, jnp.float32)
    point, normal, gap = z.astype(wide), plane.normal.astype(wide), plane.gap.astype(wide)
    steepest = largest(jnp.abs(normal))
    scale = jnp.where(steepest > 0, steepest, 1)
    # Scaled to a largest slope of 1: squares of tiny gradients do not underflow.
    slope, rise = jnp.abs(normal / scale), jnp.abs(gap / scale)
    towards = jnp.sign(normal) * jnp.sign(gap)
    room = jnp.maximum(jnp.where(towards > 0, threat.upper - point, point - threat.lower), 0)
    lengths = _MOVES[type(threat)](slope.ravel(), room.ravel(), rise).reshape(z.shape)
    unknown = jnp.isnan(rise) | ~(steepest > 0)
    return jnp.where(unknown, 0, towards * lengths).astype(z.dtype)


def _evenly(slope: Array, room: Array, rise: Array) -> Array:
    return _closing(slope, room, rise, speed=jnp.where(slope > 0, 1, jnp.zeros_like(slope)))


def _by_slope(slope: Array, room: Array, rise: Array) -> Array:
    return _closing(slope, room, rise, speed=slope)


def _closing(slope: Array, room: Array, rise: Array, *, speed: Array) -> Array:
    """``min(t speed, room)`` with the least ``t`` for which the slopes times that add up to ``rise``.

    The sum is concave and piecewise linear in ``t``. Newton's method from the left meets it exactly, after as many
    rounds as it takes until no further coordinate meets the box.
    """

    def newton(t):
        meets = t * speed >= room
        left, rate = rise - _dot(jnp.where(meets, room, 0), slope), _dot(jnp.where(meets, 0, speed), slope)
        return jnp.where(rate > 0, left / _positive(rate), jnp.inf)

    first = jnp.zeros_like(rise)
    rounds = jax.lax.while_loop(
        lambda pair: pair[1] > pair[0], lambda pair: (pair[1], newton(pair[1])), (first, newton(first))
    )
    return jnp.where(speed > 0, jnp.minimum(rounds[0] * _positive(speed), room), 0)


def _steepest_first(slope: Array, room: Array, rise: Array) -> Array:
    """All of the room for the largest slopes, the part that is missing for those next in size, equal ones alike."""
    integer = jnp.int64 if slope.dtype == jnp.float64 else jnp.int32
    order = jax.lax.bitcast_convert_type(slope, integer)  # Floats that are not negative have the order of their bits.

    def gained(least):
        return _dot(jnp.where(order >= least, room, 0), slope)

    def halve(bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        enough = gained(middle) >= rise
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The least slope that is used is at least `low` and below `high`.
    bracket = jnp.zeros((), integer), largest(order) + 1
    low, high = jax.lax.while_loop(lambda bracket: bracket[1] - bracket[0] > 1, halve, bracket)
    before = gained(high)
    share = jnp.clip((rise - before) / _positive(gained(low) - before), 0, 1)
    part = jnp.where(order == low, share, 0)
    return jnp.where(slope > 0, jnp.where(order >= high, 1, part), 0) * room


def _positive(value: Array) -> Array:
    return jnp.where(value > 0, value, 1)


def _dot(left: Array, right: Array) -> Array:
    return total(left * right)


_MOVES: dict[type, Any] = {Linf: _evenly, L2: _by_slope, L1: _steepest_first}
