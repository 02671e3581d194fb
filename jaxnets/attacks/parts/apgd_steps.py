"""How Auto-PGD moves, for one example: steps that halve (Linf, L2), and sparse steps in a shrinking ball (L1)."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnets.attacks.parts.start import Start, uniform
from jaxnets.draws import drawn
from jaxnets.threats import L1, L2, Linf, Threat, each_row
from jaxnets.types import Array

_LEAST_SHARE, _SHRINK = 10, 1.5


class Point(NamedTuple):
    """Where a loss and its gradient are known: ``x`` and ``gradient`` of one shape, ``loss`` a scalar."""

    x: Array
    gradient: Array
    loss: Array


class Schedule(NamedTuple):
    """How one example moves.

    Attributes:
      phases: pairs of a number of steps, and how many times epsilon is the radius of the ball meanwhile; the last is 1.
      init: ``(number of the phase, threat, x, x_0) -> state``.
      move: ``(step in the phase, state, threat, x, now, top) -> (x_next, state)``, for the point just evaluated and
        that of the highest loss in this phase; ``x_next`` lies inside the threat.
      start: where the first iterate lies, unless the caller says; in the ball of the first phase.
    """

    phases: tuple[tuple[int, float], ...]
    init: Callable[[Any, Threat, Array, Array], Any]
    move: Callable[[Any, Any, Threat, Array, Point, Point], tuple[Array, Any]]
    start: Start


@singledispatch
def schedule_of(threat: Threat, steps: int) -> Schedule:
    """The schedule for a threat's norm. Raises ValueError where there is none."""
    raise ValueError(f"apgd takes an Linf, L2 or L1 threat, got {threat!r}")


# Linf and L2: momentum, and a step size that is halved where it is too long.


class _Halving(NamedTuple):
    """What is carried from step to step.

    Attributes:
      previous: the iterate before this one.
      loss: where the last step began.
      length: of a step.
      rises: how many steps since the last checkpoint have raised the loss.
      halved: whether the last checkpoint halved the length.
      top_loss: the highest loss at the last checkpoint.
    """

    previous: Array
    loss: Array
    length: Array
    rises: Array
    halved: Array
    top_loss: Array


def checkpoints(steps: int) -> list[int]:
    """The steps after which step sizes are looked at: 0.22 N, then at intervals shorter by 0.03 N, of 0.06 N at least.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    interval, shorter, least = (max(share * steps // 100, 1) for share in (22, 3, 6))
    places, place = [], interval
    while place <= steps:
        places.append(place)
        interval = max(interval - shorter, least)
        place += interval
    return places


@schedule_of.register(Linf)
@schedule_of.register(L2)
def _halving(threat: Threat, steps: int) -> Schedule:
    intervals = np.full(steps + 1, -1)
    places = [0, *checkpoints(steps)]
    intervals[places] = np.diff(places, prepend=0)
    return Schedule(((steps, 1.0),), Partial(_start_halving), Partial(_move_halving, jnp.asarray(intervals)), uniform)


def _start_halving(phase: Any, threat: Threat, x: Array, x_0: Array) -> _Halving:
    # Step 0 is looked at too: nothing is halved there, as no loss exceeds infinity and this says it has been already.
    infinite = jnp.asarray(jnp.inf, jnp.promote_types(x.dtype, jnp.float32))
    length = jnp.asarray(2 * threat.epsilon, x.dtype)
    return _Halving(x_0, infinite, length, jnp.int32(0), jnp.bool_(True), infinite)


def _move_halving(intervals: Array, step: Any, state: _Halving, threat: Threat, x: Array, now: Point, top: Point):
    interval, rises = intervals[step], state.rises + (now.loss > state.loss)
    looked = interval >= 0
    stuck = ~state.halved & (top.loss == state.top_loss)
    halve = looked & ((4 * rises < 3 * interval) | stuck)
    length = jnp.where(halve, state.length / 2, state.length)
    here = _choose(halve, top, now)
    z = threat.project(here.x + length * threat.direction(here.gradient, here.x), x)
    momentum = jnp.where(step > 0, 0.25, 0).astype(x.dtype)
    x_next = threat.project(here.x + (1 - momentum) * (z - here.x) + momentum * (here.x - state.previous), x)
    rises, halved = jnp.where(looked, 0, rises), jnp.where(looked, halve, state.halved)
    return x_next, _Halving(here.x, here.loss, length, rises, halved, jnp.where(looked, top.loss, state.top_loss))


# L1: steps along the largest entries of the gradient, as many as the best perturbation so far says.


class _Sparse(NamedTuple):
    """What is carried from step to step.

    Attributes:
      length: of a step.
      entries: how many coordinates a step changes.
      support: how many the point of highest loss had changed at the last check.
      every: how many steps lie between checks.
    """

    length: Array
    entries: Array
    support: Array
    every: Array


@schedule_of.register
def _sparse(threat: L1, steps: int) -> Schedule:
    wide = min(-(-3 * steps // 10), (steps - 1) // 2)
    phases = ((wide, 3.0), (wide, 2.0), (steps - 2 * wide, 1.0))
    every = jnp.asarray([max(number // 25, 1) for number, _ in phases])
    return Schedule(phases, Partial(_start_sparse, every), Partial(_move_sparse), projected_noise)


def projected_noise(keys: Array, threat: Threat, x: Array) -> Array:
    """Normal noise, as wide as the box, projected on ball and box: in L1 most coordinates stay where they were."""
    width = threat.upper - threat.lower

    def one(threat, key, x):
        return threat.project(x + width * drawn(jax.random.normal, key, x.shape, x.dtype), x)

    return each_row(one, threat, keys, x)


def _start_sparse(every: Array, phase: Any, threat: L1, x: Array, x_0: Array) -> _Sparse:
    changed = jnp.sum(x_0 != x, dtype=jnp.int32)
    # A start at the clean point says nothing of how many coordinates to change.
    entries = jnp.where(changed > 0, _entries(changed), -(-x.size // 5))
    return _Sparse(jnp.asarray(threat.epsilon, x.dtype), entries, jnp.where(changed > 0, changed, x.size), every[phase])


def _move_sparse(step: Any, state: _Sparse, threat: L1, x: Array, now: Point, top: Point):
    looked = (step > 0) & (step % state.every == 0)
    support = jnp.sum(top.x != x, dtype=jnp.int32)
    sparser = looked & (support < 0.95 * state.support)
    epsilon = jnp.asarray(threat.epsilon, x.dtype)
    length = jnp.where(sparser, epsilon, jnp.maximum(state.length / _SHRINK, epsilon / _LEAST_SHARE))
    entries = jnp.where(looked, _entries(support), state.entries)
    here, length = _choose(sparser, top, now), jnp.where(looked, length, state.length)
    x_next = threat.project(here.x + length * _largest(here.gradient, entries), x)
    return x_next, _Sparse(length, entries, jnp.where(looked, support, state.support), state.every)


def _entries(support: Array) -> Array:
    """Of a perturbation of so many coordinates two thirds, rounded up."""
    return jnp.maximum(-(-2 * support // 3), 1)


def _largest(gradient: Array, entries: Array) -> Array:
    """The signs of the largest entries of a gradient, divided by their number; more than ``entries`` on ties alone."""
    sizes = jnp.abs(gradient)
    signs = jnp.where(sizes >= _kth_largest(sizes, entries), jnp.sign(gradient), 0)
    return signs / jnp.maximum(jnp.sum(jnp.abs(signs)), 1)


def _kth_largest(sizes: Array, k: Array) -> Array:
    """The ``k``-th largest of numbers that are not negative: their bits, read as integers, are ordered as they are.

    Found bit by bit, which costs less than sorting.
    """
    integer = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[sizes.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(sizes, integer)

    def settle(place, found):
        trial = found | jnp.left_shift(jnp.ones((), integer), (last - place).astype(integer))
        return jnp.where(jnp.sum(bits >= trial, dtype=jnp.int32) >= k, trial, found)

    last = 8 * sizes.dtype.itemsize - 2
    found = jax.lax.fori_loop(0, last + 1, settle, jnp.zeros((), integer))
    return jax.lax.bitcast_convert_type(found, sizes.dtype)


def _choose(first: Array, a: Point, b: Point) -> Point:
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), a, b)
