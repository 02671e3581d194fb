"""HopSkipJump: from the label alone, estimate the boundary's normal, step over it and come back to it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.decisions import Blend, Decisions, check_start, find_start, select, straight, to_boundary
from jaxnets.attacks.parts.minimum_norm import spread
from jaxnets.attacks.parts.queries import Queried, counts_queries
from jaxnets.attacks.parts.ranking import Nearest, nearer, nothing_found, within
from jaxnets.draws import drawn
from jaxnets.losses import margin
from jaxnets.threats import L2, Linf, Threat, check_one_a_row, each_row, sizes
from jaxnets.types import Array, LogitsFn, Loss


@counts_queries
def hop_skip_jump(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    queries: Any = 10_000,
    loss: Loss = margin,
    start_points: Array | None = None,
    draws: Any = 100,
    stop_at: Any = 0.0,
    first: Any = 100,
    most: Any = 10_000,
    gamma: Any = 1.0,
    at_once: int = 25,
) -> Queried:
    """HopSkipJump: the smallest perturbation found with ``queries`` predicted labels a row.

    Round ``t = 1, 2, ...`` at ``x_t`` on the boundary, with ``phi = 1`` for the labels wanted and ``-1`` for others::

        g = mean_b (phi(x_t + delta_t u_b) - mean phi) u_b,   |u_b|_2 = 1, b = 1 .. min(first sqrt(t), most)
        z = x_t + xi direction(g),   xi = size(x_t - x) / sqrt(t), halved until phi(z) = 1
        x_{t+1} = the point nearest to x between x and z where phi = 1, by halving to theta

    With ``d`` inputs, ``theta = gamma d^(-3/2)`` and ``delta_t = sqrt(d) theta size(x_t - x)`` for `L2`,
    ``gamma d^-2`` and ``d theta size(x_t - x)`` for `Linf`. ``theta`` is kept above 16 units of rounding, below
    which a network's label is noise, and below 0.001, which few inputs need.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``; nothing but the argmax is used.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: `L2` or `Linf`; epsilon may be infinite.
      queries: that a row may ask, scalar or ``[B]``, all of which count: the first is for the clean row.
      loss: for its goal alone; `losses.targeted` of any for a targeted attack.
      start_points: ``[B, ...]``, of the labels wanted; a targeted attack hardly does without.
      draws: images uniform in the box that are tried where there is no starting point, or not of a label wanted.
      stop_at: a row whose perturbation is no larger than this asks no more, scalar or ``[B]``.
      first, most: queries for the gradient in the first round, and in any round.
      gamma: scales the precision of the search and the radius of the estimate.
      at_once: queries a row in one call of the model; static. Memory is in proportion to it, results but for rounding
        are the same.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype: ``x`` itself where it has a label wanted already, and where nothing was found
      within epsilon. `with_queries` gives the counts too.

    Raises:
      ValueError: for shapes or dtypes that do not fit, another threat, or ``at_once`` below one.

    Chen et al. 2020, https://arxiv.org/abs/1904.02144.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.7, 0.5]]), jnp.array([0])
    >>> x_adv = hop_skip_jump(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(jnp.inf), queries=2000)
    >>> print(jnp.linalg.norm(x_adv - x).round(2))
    0.14
    """
    check_rows(x, target)
    if type(threat) not in _GEOMETRY:
        raise ValueError(f"hop_skip_jump takes L2 and Linf, got {threat}")
    if at_once < 1:
        raise ValueError(f"hop_skip_jump asks at least one query at once, got at_once={at_once}")
    check_start("hop_skip_jump", threat, x, start_points)
    check_one_a_row(x, epsilon=threat.epsilon, queries=queries, stop_at=stop_at)
    settings = _Settings(draws, stop_at, first, most, gamma)
    arguments = (as_pytree(logits_fn), x, target, threat, queries, as_pytree(loss), start_points, settings)
    return _hop_skip_jump(key, *arguments, at_once=at_once)


class _Settings(NamedTuple):
    draws: Any
    stop_at: Any
    first: Any
    most: Any
    gamma: Any


class _Geometry(NamedTuple):
    """What differs between norms: ``theta = gamma d^-power``, directions drawn before they are normalised, the way."""

    power: float
    draw: Any
    blend: Blend

    def theta(self, gamma: Any, x: Array) -> Array:
        theta = jnp.asarray(gamma * (x.size / len(x)) ** -self.power, x.dtype)
        return jnp.clip(theta, 16 * jnp.finfo(x.dtype).eps, max(_COARSEST, 16 * jnp.finfo(x.dtype).eps))

    def radius(self, theta: Array, size: Array, x: Array) -> Array:
        return (x.size / len(x)) ** (self.power - 1) * theta * size


def _into_cube(x: Array, x_adv: Array, s: Array) -> Array:
    """``x_adv`` cut to ``s`` times its largest distance from ``x``."""
    side = s * jnp.max(jnp.abs(x_adv - x))
    return jnp.clip(x_adv, x - side, x + side)


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


_COARSEST = 1e-3
_GEOMETRY = {L2: _Geometry(1.5, jax.random.normal, straight), Linf: _Geometry(2.0, _uniform, _into_cube)}


class _Walk(NamedTuple):
    number: Array
    x: Array
    used: Array
    best: Nearest


@partial(jax.jit, static_argnames="at_once")
def _hop_skip_jump(key, logits_fn, x, target, threat, queries, loss, start_points, settings, *, at_once):
    geometry = _GEOMETRY[type(threat)]
    keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(row_keys(key, len(x)))
    budget = jnp.broadcast_to(jnp.asarray(queries, jnp.int32), len(x))
    decisions = Decisions(logits_fn, keys[2], target, loss, budget)
    theta = geometry.theta(settings.gamma, x)
    # What a round needs behind its gradient, so that this is not estimated in vain: a few steps, and the search.
    behind = 3 + jnp.ceil(-jnp.log2(theta)).astype(jnp.int32)
    started = find_start(decisions, keys[0], threat, x, start_points, settings.draws)
    walking = started.found & ~started.clean

    def on_boundary(z, used, best, among):
        point, used = to_boundary(decisions, geometry.blend, x, z, used, among, theta)
        return point, used, nearer(best, point, among, sizes(threat, point, x))

    def alive(walk):
        return walking & (walk.best.size > settings.stop_at) & (budget - walk.used > behind)

    def hop(walk):
        going, size = alive(walk), sizes(threat, walk.x, x)
        count = jnp.minimum(settings.first * jnp.sqrt(walk.number + 1.0), settings.most).astype(jnp.int32)
        count = jnp.where(going, jnp.minimum(count, budget - walk.used - behind), 0)
        radius = geometry.radius(theta, size, x)
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys[1], walk.number)
        normal, used = _normal(decisions, geometry.draw, own, threat, walk.x, radius, count, walk.used, at_once)
        direction = each_row(lambda threat, g, z: threat.direction(g, z), threat, normal, walk.x)
        z, over, used = _step_over(
            decisions, threat, walk.x, direction, size / jnp.sqrt(walk.number + 1.0), theta * size, used, going
        )
        z, used, best = on_boundary(z, used, walk.best, over)
        return _Walk(walk.number + 1, z, used, best)

    z, used, best = on_boundary(started.x, started.used, nothing_found(x), walking)
    walk = jax.lax.while_loop(lambda walk: jnp.any(alive(walk)), hop, _Walk(jnp.zeros((), jnp.int32), z, used, best))
    return Queried(within(walk.best, threat, x), walk.used)


def _normal(decisions, draw, keys, threat, x, radius, count, used, at_once):
    """The estimate of the boundary's normal at each row from ``count[B]`` labels, and the queries used."""

    def one(key, x, radius, number):
        u = drawn(draw, jax.random.fold_in(key, number), x.shape, x.dtype)
        u = u / jnp.maximum(jnp.sqrt(jnp.sum(u**2)), jnp.finfo(x.dtype).tiny)
        z = jnp.clip(x + radius * u, threat.lower, threat.upper)
        return z, (z - x) / jnp.where(radius > 0, radius, 1)

    def add(carry):
        done, used, ups, total, signed = carry
        numbers = done + jnp.arange(at_once)
        z, u = jax.vmap(jax.vmap(one, in_axes=(None, None, None, 0)), in_axes=(0, 0, 0, None))(keys, x, radius, numbers)
        among = numbers < count[:, None]
        reached, used = decisions.ask_many(z, used, among)
        weigh = jax.vmap(lambda weight, u: jnp.tensordot(weight.astype(u.dtype), u, 1))
        total, signed = total + weigh(among, u), signed + weigh(jnp.where(among, 2.0 * reached - 1, 0), u)
        return done + at_once, used, ups + jnp.sum(reached, axis=1, dtype=ups.dtype), total, signed

    zero = jnp.zeros_like(x)
    carry = jnp.zeros((), jnp.int32), used, jnp.zeros(len(x), jnp.int32), zero, zero
    _, used, ups, total, signed = jax.lax.while_loop(lambda c: c[0] < jnp.max(count), add, carry)
    mean = (2 * ups / jnp.maximum(count, 1) - 1).astype(x.dtype)
    # Where all labels agree nothing is left of the difference from their mean.
    baseline = jnp.where(jnp.abs(mean) < 1, mean, 0)
    return signed - spread(baseline, x) * total, used


def _step_over(decisions, threat, x, direction, length, shortest, used, among):
    """The longest of ``length, length / 2, ...`` along ``direction`` whose label is wanted, where there is one."""

    def open_rows(length, over, used):
        return among & ~over & (length > shortest) & (used < decisions.budget)

    def shorten(carry):
        length, point, over, used = carry
        z = jnp.clip(x + spread(length, x) * direction, threat.lower, threat.upper)
        reached, used = decisions.ask(z, used, open_rows(length, over, used))
        return length / 2, select(reached, z, point), over | reached, used

    carry = length, x, jnp.zeros(len(x), bool), used
    return jax.lax.while_loop(lambda c: jnp.any(open_rows(c[0], c[2], c[3])), shorten, carry)[1:]
