"""Attacks that ask for logits and estimate the gradient from them: NES and SPSA."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.compaction import until_done
from jaxnets.attacks.parts.queries import Queried, counts_queries
from jaxnets.attacks.parts.ranking import Candidate, better, candidate, nothing_yet
from jaxnets.attacks.parts.rules import Rule, by_optax, normalized, steepest
from jaxnets.attacks.parts.stochastic import expected_logits, redrawn
from jaxnets.draws import drawn
from jaxnets.losses import margin
from jaxnets.threats import Threat, a_row, check_one_a_row
from jaxnets.types import Array, LogitsFn, Loss

Draw = Callable[[Array, tuple[int, ...], Any], Array]
"""``(key, shape, dtype) -> u``: a random direction with ``E[u u^T] = I``."""

_STEEPEST = steepest()
_ADAM = normalized(by_optax(optax.adam(1.0)))


@counts_queries
def nes(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    queries: int = 10_000,
    samples: int = 50,
    sigma: Any = 0.001,
    loss: Loss = margin,
    step_size: Any = 0.01,
    rule: Rule = _STEEPEST,
    at_once: int | None = None,
) -> Queried:
    """Natural evolution strategies: steepest steps along ``g = mean_i (loss(x + s u_i) - loss(x - s u_i)) u_i / 2s``.

    The directions ``u_i`` are normal. A row starts at the clean point, which costs it one query; each step then costs
    ``2 samples`` for the gradient and one for the new point. It stops at its first success, and returns that, or else
    its point of highest loss. The points ``x +- s u_i`` may lie outside ball and box; what is returned does not.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``, for any ``B``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: the ball and the box.
      queries: the most that a row may cost, at least ``2 samples + 2``: what is left after the last whole step is not
        used. Another budget is no new trace.
      samples: pairs of points a gradient; static.
      sigma: ``s``, in the units of the data.
      loss: raised by the attack; `losses.targeted` for a targeted one. The authors take the cross-entropy, whose
        differences vanish in rounding where the model is sure.
      step_size: length of a step in the threat's norm, scalar or ``[B]``.
      rule: what is done with the estimate; the steepest step of the threat's norm unless given.
      at_once: pairs a row in one call of the model, of ``2 B at_once`` rows; all of them unless given. The result does
        not depend on it, the memory does. It divides ``samples``; static.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype; by `with_queries` also the queries ``[B]``.

    Raises:
      ValueError: for too few queries or samples, or shapes and dtypes that do not fit.

    Ilyas et al. 2018, https://arxiv.org/abs/1804.08598.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> logits_fn = lambda x: x + jnp.array([0.15, 0.0])
    >>> print(nes(jax.random.key(0), logits_fn, x, y, threat=jn.Linf(0.1), step_size=0.1).round(3))
    [[0.4 0.6]]
    """
    settings = Sampling(jax.random.normal, samples, samples if at_once is None else at_once)
    return _climb("nes", key, logits_fn, x, target, threat, queries, settings, sigma, loss, step_size, rule)


@counts_queries
def spsa(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    queries: int = 25_800,
    samples: int = 128,
    sigma: Any = 0.01,
    loss: Loss = margin,
    step_size: Any = 0.01,
    rule: Rule = _ADAM,
    at_once: int | None = None,
) -> Queried:
    """Simultaneous perturbation stochastic approximation: `nes` with random signs as directions, and Adam's steps.

    ``g = mean_i (loss(x + s v_i) - loss(x - s v_i)) / (2s v_i)`` where every coordinate of ``v_i`` is 1 or -1 at
    random. Adam is given ``g / mean |g|``, so that its steps do not depend on the scale of the logits.

    Args:
      key, logits_fn, x, target, threat, queries, samples, sigma, loss, at_once: as for `nes`.
      step_size: Adam's learning rate, in the units of the data, scalar or ``[B]``.
      rule: what is done with the estimate; Adam unless given, whose steps suit `Linf`. `rules.steepest` suits any norm.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype; by `with_queries` also the queries ``[B]``.

    Raises:
      ValueError: for too few queries or samples, or shapes and dtypes that do not fit.

    Uesato et al. 2018, https://arxiv.org/abs/1802.05666.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> logits_fn = lambda x: x + jnp.array([0.15, 0.0])
    >>> print(spsa(jax.random.key(0), logits_fn, x, y, threat=jn.Linf(0.1), step_size=0.1).round(3))
    [[0.4 0.6]]
    """
    settings = Sampling(rademacher, samples, samples if at_once is None else at_once)
    return _climb("spsa", key, logits_fn, x, target, threat, queries, settings, sigma, loss, step_size, rule)


def rademacher(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Independent signs, 32 of them from each random word."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (2 * bits.ravel()[:size].astype(dtype) - 1).reshape(shape)


class Sampling(NamedTuple):
    """How a gradient is estimated: the directions, how many pairs of points, and how many of them at once."""

    draw: Draw
    samples: int
    at_once: int


def estimated_gradient(
    keys: Array, logits_fn: LogitsFn, loss: Loss, x: Array, target: Array, sigma: Any, settings: Sampling
) -> Array:
    """``mean_i (loss(x + s u_i) - loss(x - s u_i)) u_i / 2s`` of every row, ``[B, ...]``; a pair that is NaN gives 0.

    Args:
      keys: one a row, ``[B]``. Both points of a pair see the same draw of a `Stochastic` model.
      logits_fn, loss, x, target: as for `nes`.
      sigma: ``s``.
      settings: see `Sampling`.
    """
    direction_keys, model_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

    def add(part, total):
        each = jax.vmap(partial(_each_key, part * settings.at_once + jnp.arange(settings.at_once)))
        draw = jax.vmap(lambda key: drawn(settings.draw, key, x.shape[1:], x.dtype))
        u = jax.vmap(draw)(each(direction_keys))
        points = x[:, None, None] + sigma * jnp.stack([u, -u], axis=2)
        rows = 2 * settings.at_once
        model = redrawn(logits_fn, jnp.repeat(each(model_keys).ravel(), 2), 0)
        logits = expected_logits(model, points.reshape(-1, *x.shape[1:]).astype(x.dtype))
        losses = loss(logits, jnp.repeat(target, rows, axis=0)).reshape(len(x), settings.at_once, 2)
        slopes = (losses[..., 0] - losses[..., 1]) / (2 * sigma * settings.samples)
        slopes = jnp.where(jnp.isfinite(slopes), slopes, 0).astype(x.dtype)
        return total + jnp.einsum("bs,bs...->b...", slopes, u, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.fori_loop(0, settings.samples // settings.at_once, add, jnp.zeros_like(x))


def _each_key(numbers: Array, key: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def _climb(name, key, logits_fn, x, target, threat, queries, settings, sigma, loss, step_size, rule) -> Queried:
    check_rows(x, target)
    check_one_a_row(x, epsilon=threat.epsilon, step_size=step_size)
    _, samples, at_once = settings
    if samples < 1 or at_once < 1 or samples % at_once:
        raise ValueError(
            f"{name} takes at least one pair of samples, in equal parts: got samples={samples}, at_once={at_once}"
        )
    least = 2 * samples + 2
    if isinstance(queries, int) and queries < least:
        raise ValueError(f"{name} takes at least {least} queries for one step of {samples} pairs, got {queries}")
    arguments = (as_pytree(logits_fn), x, target, threat, queries, sigma, as_pytree(loss), step_size, rule)
    return _estimated(key, *arguments, settings=settings)


class _Rows(NamedTuple):
    """What does not change."""

    keys: Array
    x: Array
    target: Array
    threat: Threat
    lengths: Array


class _State(NamedTuple):
    """The iterate, the rule's state, the best point so far, and its row's queries."""

    x: Array
    rule: Any
    best: Candidate
    queries: Array


@partial(jax.jit, static_argnames="settings")
def _estimated(key, logits_fn, x, target, threat, queries, sigma, loss, step_size, rule, *, settings) -> Queried:
    epsilon, lengths = (a_row(value, x) for value in (threat.epsilon, step_size))
    rows = _Rows(row_keys(key, len(x)), x, target, replace(threat, epsilon=epsilon), lengths)

    def judged(number, rows, x_t, best):
        logits = expected_logits(redrawn(logits_fn, rows.keys, number), x_t)
        return better(best, candidate(loss, x_t, logits, rows.target), among=~best.success)

    def climb(number, rows, state):
        place = jax.vmap(rule.place)(state.rule, rows.lengths, state.x)
        # Even numbers for the gradient, odd ones for the judgement of a model that draws.
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, 2 * number)
        gradient = estimated_gradient(keys, logits_fn, loss, place, rows.target, sigma, settings)
        x_t, rule_state = jax.vmap(partial(_step, rule))(rows, state, gradient)
        cost = jnp.where(state.best.success, 0, 2 * settings.samples + 1)
        return _State(x_t, rule_state, judged(2 * number + 1, rows, x_t, state.best), state.queries + cost)

    first = judged(1, rows, x, nothing_yet(x))
    state = _State(x, jax.vmap(rule.init)(x), first, jnp.ones(len(x), jnp.int32))
    end = 1 + (queries - 1) // (2 * settings.samples + 1)
    state = until_done(climb, lambda state: state.best.success, end, rows, state, 1)
    return Queried(state.best.x, state.queries)


def _step(rule: Rule, row: _Rows, state: _State, gradient: Array) -> tuple[Array, Any]:
    z, rule_state = rule.step(state.rule, row.threat, row.lengths, gradient, state.x)
    return row.threat.project(z, row.x), rule_state
