"""Attacks that minimise ``penalty(delta) + const * shortfall`` for several constants, every row by its own timetable.

The shortfall is what the loss lacks of success, ``max(confidence - loss, 0)``. A row that is through with one constant
goes on to its next while others still work on theirs: one loop, with one forward and backward pass of all rows a step.
Perturbations ``delta`` are in widths of the box, so that the papers' constants hold for any units of the data.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import as_pytree, check_rows, checked_logits, row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.minimum_norm import box_width, shortened
from jaxnets.attacks.parts.ranking import nearer, nothing_found, within
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import cross_entropy, succeeded, targeted
from jaxnets.threats import Threat, check_one_a_row, sizes
from jaxnets.types import Array, LogitsFn, Loss


class Minimiser(NamedTuple):
    """How one example goes downhill for a fixed constant: a pytree of `jax.tree_util.Partial`s.

    Attributes:
      init: ``(threat, x, start) -> state``.
      place: ``(state, threat, x) -> point`` in the box, where the objective and its gradient are taken.
      step: ``(state, threat, x, point, value, gradient) -> state``; ``gradient`` is with respect to ``delta``.
    """

    init: Callable[[Threat, Array, Array], Any]
    place: Callable[[Any, Threat, Array], Array]
    step: Callable[[Any, Threat, Array, Array, Array, Array], Any]


class Search(NamedTuple):
    """Which constants a row tries, one round each: a pytree of `jax.tree_util.Partial`s.

    Attributes:
      init: ``(dtype) -> setting``, which has a ``const``.
      penalty: ``(setting, delta) -> scalar``.
      verdict: ``(setting, value, success) -> (found, over)``: whether this constant works, and whether its round ends.
      after: ``(setting, found, size) -> setting`` of the next round; ``size`` is ``max_i |delta_i|`` of the last point.
      start: ``(x, point) -> x_0`` of the next round, from the clean row and the last point.
      done: ``(setting) -> bool``.
    """

    init: Callable[[Any], Any]
    penalty: Callable[[Any, Array], Array]
    verdict: Callable[[Any, Array, Array], tuple[Array, Array]]
    after: Callable[[Any, Array, Array], Any]
    start: Callable[[Array, Array], Array]
    done: Callable[[Any], Array]


class Row(NamedTuple):
    """One row at work: its minimiser, its constant, and how this round goes."""

    state: Any
    setting: Any
    step: Array
    found: Array
    lowest: Array
    mark: Array


class Bracket(NamedTuple):
    """The constants of a binary search: ``low`` did not succeed, ``high`` did."""

    const: Array
    low: Array
    high: Array
    round: Array


def binary_search(initial_const: Any, rounds: Any, penalty: Callable[[Any, Array], Array] | None = None) -> Search:
    """Ten times the constant until one succeeds, then halfway between the last failure and the last success.

    Every round starts at the clean point. The penalty is ``|delta|_2^2`` unless given.
    """
    return Search(
        Partial(_bracket, initial_const),
        Partial(_squared_length) if penalty is None else penalty,
        Partial(_any_success),
        Partial(_narrowed),
        Partial(_at_clean),
        Partial(_rounds_over, rounds),
    )


def _bracket(initial: Any, dtype: Any) -> Bracket:
    return Bracket(jnp.asarray(initial, dtype), jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype), jnp.int32(0))


def _squared_length(setting: Any, delta: Array) -> Array:
    return jnp.sum(delta**2)


def _any_success(setting: Any, value: Array, success: Array) -> tuple[Array, Array]:
    return success, jnp.zeros_like(success)


def _narrowed(bracket: Bracket, found: Array, size: Array) -> Bracket:
    low, high = jnp.where(found, bracket.low, bracket.const), jnp.where(found, bracket.const, bracket.high)
    const = jnp.where(jnp.isinf(high), 10 * bracket.const, (low + high) / 2)
    return Bracket(const, low, high, bracket.round + 1)


def _at_clean(x: Array, point: Array) -> Array:
    return x


def _rounds_over(rounds: Any, bracket: Bracket) -> Array:
    return bracket.round >= rounds


def nearest_by_penalty(
    name: str,
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    minimiser: Minimiser,
    search: Search,
    loss: Loss,
    confidence: Any,
    steps: int,
    rounds: int,
    tolerance: Any,
    distance: Callable[[Array], Array] | None = None,
) -> Array:
    """Every row's nearest success within epsilon of all rounds and steps; the clean row where there is none.

    At the end the segment between the clean row and its result is searched for a smaller success: a few forward passes.

    Args:
      name: of the attack, for errors.
      confidence: how much the loss must be above zero; scalar or ``[B]``.
      steps: gradients a round at most.
      loss: above zero where the attack has succeeded, such as the margin.
      rounds: only checked.
      tolerance: a row leaves a round when a tenth of the steps has not lowered its objective by this share.
      distance: of a perturbation in the units of the data; the threat's size unless given.
    """
    check_rows(x, target)
    box_width(name, threat, "its penalty is of perturbations in units of the box")
    for count, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{count} must be at least 1, got {count}={value}")
    check_one_a_row(x, epsilon=threat.epsilon, confidence=confidence)
    if loss in (cross_entropy, targeted(cross_entropy)):
        raise ValueError(
            "a search over constants needs a loss whose sign says whether the attack has succeeded: margin or "
            "targeted(margin), not cross_entropy, which is never below zero"
        )
    # Not `threat.size`, which would be static with its epsilon.
    distance = Partial(_size, threat) if distance is None else distance
    arguments = (as_pytree(logits_fn), x, target, threat, minimiser, search, as_pytree(loss), as_pytree(distance))
    return _run(key, *arguments, confidence, steps, tolerance)


def to_widths(threat: Threat, x: Array, point: Array) -> Array:
    """The perturbation in widths of the box, in at least single precision."""
    return ((point - x) / (threat.upper - threat.lower)).astype(jnp.promote_types(x.dtype, jnp.float32))


def to_box(threat: Threat, x: Array, delta: Array) -> Array:
    """The point of the box for a perturbation in its widths; exactly ``x`` where that is zero."""
    return jnp.clip(x + (threat.upper - threat.lower) * delta, threat.lower, threat.upper)


def _size(threat: Threat, delta: Array) -> Array:
    return threat.size(delta)


def shortfall(logits: Array, target: Array, loss: Loss, confidence: Array) -> Array:
    return jnp.maximum(confidence - loss(logits, target), 0)


def reached(logits: Array, target: Array, loss: Loss, confidence: Array) -> Array:
    """Success with the confidence asked for; never where logits are NaN."""
    return succeeded(loss, logits, target) & (loss(logits, target) >= confidence)


@jax.jit
def _run(key, logits_fn, x, target, threat, minimiser, search, loss, distance, confidence, steps, tolerance):
    keys, width = row_keys(key, len(x)), threat.upper - threat.lower
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    confidence = jnp.broadcast_to(jnp.asarray(confidence, dtype), len(x))
    lacking = partial(shortfall, loss=loss, confidence=confidence)

    def look(logits, x_new, best, among):
        """The nearest so far, and which rows succeed."""
        success = reached(logits, target, loss, confidence)
        return nearer(best, x_new, success & among, jax.vmap(distance)(x_new - x)), success

    def descend(carry):
        number, best, rows = carry
        point = jax.vmap(lambda state, x: minimiser.place(state, threat, x).astype(x.dtype))(rows.state, x)
        slope, logits = input_gradient(redrawn(logits_fn, keys, number), lacking, point, target)
        working = ~jax.vmap(search.done)(rows.setting)
        best, success = look(logits, point, best, working)
        advance = partial(_advance, threat, minimiser, search, steps, tolerance, width)
        rows = jax.vmap(advance)(rows, x, point, slope.astype(dtype), lacking(logits, target), success)
        return number + 1, best, rows

    logits = checked_logits(redrawn(logits_fn, keys, 0)(x), x)
    best, success = look(logits, x, nothing_found(x), True)
    rows = jax.vmap(partial(_first, threat, minimiser, search, dtype))(x)
    # A row whose goal is reached at x is through: what it does from here on is not looked at.
    working = lambda carry: jnp.any(~jax.vmap(search.done)(carry[2].setting) & ~success)  # noqa: E731
    _, best, _ = jax.lax.while_loop(working, descend, (jnp.int32(1), best, rows))

    def succeeds(halving, point):
        # Draws of no step: how many steps its batch has taken is nothing to a row.
        logits = checked_logits(redrawn(logits_fn, keys, -1 - halving)(point), x)
        return reached(logits, target, loss, confidence)

    best = shortened(best, x, succeeds, lambda point: jax.vmap(distance)(point - x))
    return within(best._replace(size=sizes(threat, best.x, x).astype(dtype)), threat, x)


def _first(threat: Threat, minimiser: Minimiser, search: Search, dtype: Any, x: Array) -> Row:
    return _begin(minimiser.init(threat, x, x), search.init(dtype))


def _begin(state: Any, setting: Any) -> Row:
    infinity = jnp.full_like(setting.const, jnp.inf)
    return Row(state, setting, jnp.int32(0), jnp.zeros((), bool), infinity, infinity)


def _advance(threat, minimiser, search, steps, tolerance, width, row, x, point, slope, lacking, success):
    """One row after one gradient: a step further in its round, or at the start of the next."""
    delta = to_widths(threat, x, point)
    setting, const = row.setting, row.setting.const
    penalty, pull = jax.value_and_grad(search.penalty, argnums=1)(setting, delta)
    value = penalty + const * lacking.astype(const.dtype)
    gradient = pull + const * width * slope
    # A model that breaks down at one point must not take the rest of the round with it.
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)

    found, over = search.verdict(setting, value, success)
    found, lowest = row.found | found, jnp.minimum(row.lowest, value)
    check = (row.step + 1) % jnp.maximum(steps // 10, 10) == 0
    stalled = check & (lowest > (1 - tolerance) * row.mark)
    mark = jnp.where(check | (row.step == 0), lowest, row.mark)
    on = Row(minimiser.step(row.state, threat, x, point, value, gradient), setting, row.step + 1, found, lowest, mark)

    setting = search.after(setting, found, jnp.max(jnp.abs(delta)))
    again = _begin(minimiser.init(threat, x, search.start(x, point)), setting)
    ended = (row.step + 1 >= steps) | stalled | over
    return jax.tree.map(partial(jnp.where, ended), again, on)
