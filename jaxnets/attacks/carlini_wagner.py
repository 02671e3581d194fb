"""The attacks of Carlini and Wagner: Adam on the loss of a point that a tanh keeps in the box."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import check_between
from jaxnets.attacks.parts.penalty import Minimiser, Search, binary_search, nearest_by_penalty
from jaxnets.losses import margin
from jaxnets.threats import L2, Linf, Threat
from jaxnets.types import Array, LogitsFn, Loss

_ADAM = optax.scale_by_adam()
_WIDER = 2.0
"""The tanh's range in widths of the box. At 1 a pixel on the box lies at infinity, where no gradient arrives, and
cutting it to almost 1 makes a black background take hundreds of steps to move at all."""


def carlini_wagner(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 1000,
    step_size: Any = 0.01,
    confidence: Any = 0.0,
    initial_const: Any = None,
    rounds: int | None = None,
    shrink: Any = 0.9,
    loss: Loss = margin,
    tolerance: Any = 1e-4,
) -> Array:
    """Carlini and Wagner's minimum-norm attacks: the smallest success on the way to several minima of
    ``penalty(delta) + const * max(confidence - loss(x + delta), 0)``, by Adam on ``w``.

    The point is ``middle + width tanh(w)``, with ``w`` cut where the point meets the box: twice as wide as in
    the paper, where a pixel on the box lies at infinity and cannot move. ``delta`` counts in widths of the box, so that
    the constants mean the same in any units. A round is one constant, and rows go through their rounds on their own:

    * L2: the penalty is ``|delta|_2^2``, every round starts at ``x``, and ``const`` is found by a binary search.
    * Linf: the penalty is ``sum_i max(|delta_i| - tau, 0)``. A round that gets below ``tau`` ends there, and the next
      starts from its result with ``tau`` cut to ``shrink`` of it; after one that does not, ``const`` doubles. It is
      over at ``tau <= 1/256`` or ``const > 20``.

    At the end the segment between the clean row and its result is searched for a smaller success. A step costs one
    forward and one backward pass, and there are at most ``rounds * steps``.

    Args:
      key: one key, or one a row ``[B]``; used for `Stochastic` models alone.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: classes ``[B]``.
      threat: L2 or Linf. A row whose smallest success is beyond epsilon is given back clean.
      steps: gradients a round, at least 1.
      step_size: of Adam in ``w``; about the largest step of a coordinate, in widths of the box.
      confidence: what the loss must be above zero for a success, scalar or ``[B]``.
      initial_const: the first constant; 1e-3 for L2, 1e-5 for Linf unless given.
      rounds: the most rounds, at least 1; 9 for L2 (the paper's binary search steps), 100 for Linf unless given.
      shrink: for Linf, how much smaller the next ``tau`` is, in (0, 1): the result may be ``1 / shrink`` times as large
        as it need be.
      loss: positive where the goal is reached; ``losses.targeted(margin)`` for a targeted attack.
      tolerance: a row leaves a round when a tenth of the steps has lowered its objective by less than this share; a
        negative number: never.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype; the clean row where nothing within epsilon was found.

    Raises:
      ValueError: for shapes, dtypes or numbers that do not fit, or another threat.

    Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644.

    >>> import jax, jaxnets as jn
    >>> x, y = jnp.array([[0.6, 0.5]]), jnp.array([0])
    >>> x_adv = carlini_wagner(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(jnp.inf), steps=100)
    >>> bool(jnp.abs(x_adv - jnp.array([[0.55, 0.55]])).max() < 3e-3)
    True
    """
    rounds = {L2: 9, Linf: 100}.get(type(threat), 1) if rounds is None else rounds
    if initial_const is None:
        initial_const = 1e-5 if isinstance(threat, Linf) else 1e-3
    check_between(0, jnp.inf, step_size=step_size, initial_const=initial_const)
    check_between(0, 1, shrink=shrink)
    return nearest_by_penalty(
        "carlini_wagner",
        key,
        logits_fn,
        x,
        target,
        threat=threat,
        minimiser=tanh_adam(step_size),
        search=_search(threat, initial_const, rounds, shrink),
        loss=loss,
        confidence=confidence,
        steps=steps,
        rounds=rounds,
        tolerance=tolerance,
    )


def _search(threat: Threat, initial_const: Any, rounds: int, shrink: Any) -> Search:
    if isinstance(threat, L2):
        return binary_search(initial_const, rounds)
    if isinstance(threat, Linf):
        return shrinking_cap(initial_const, rounds, shrink)
    raise ValueError(f"carlini_wagner supports the threats L2 and Linf, got {type(threat).__name__}")


class InTanh(NamedTuple):
    """A point as ``middle + width tanh(w)``, and what Adam remembers of it."""

    w: Array
    adam: Any


def tanh_adam(step_size: Any) -> Minimiser:
    """Adam in the space of the tanh, cut to the box."""
    return Minimiser(Partial(_to_tanh), Partial(_from_tanh), Partial(_adam_step, step_size))


def _to_tanh(threat: Threat, x: Array, start: Array) -> InTanh:
    middle, half = (threat.upper + threat.lower) / 2, _WIDER * (threat.upper - threat.lower) / 2
    w = jnp.arctanh((start.astype(jnp.promote_types(x.dtype, jnp.float32)) - middle) / half)
    return InTanh(w, _ADAM.init(w))


def _from_tanh(state: InTanh, threat: Threat, x: Array) -> Array:
    middle, half = (threat.upper + threat.lower) / 2, _WIDER * (threat.upper - threat.lower) / 2
    return jnp.clip(middle + half * jnp.tanh(state.w), threat.lower, threat.upper)


def _adam_step(step_size, state, threat, x, point, value, gradient) -> InTanh:
    slope = _WIDER / 2 * (1 - jnp.tanh(state.w) ** 2)
    update, adam = _ADAM.update(slope * gradient, state.adam)
    most = jnp.arctanh(jnp.asarray(1 / _WIDER, state.w.dtype))
    return InTanh(jnp.clip(state.w - step_size * update, -most, most).astype(state.w.dtype), adam)


class Cap(NamedTuple):
    """The size ``tau`` that coordinates may have unpunished."""

    const: Array
    tau: Array
    round: Array


def shrinking_cap(initial_const: Any, rounds: Any, shrink: Any = 0.9) -> Search:
    """The search for Linf: lowers ``tau`` after every success, and doubles the constant after every failure."""
    return Search(
        Partial(_first_cap, initial_const),
        Partial(_excess),
        Partial(_under_cap),
        Partial(_next_cap, shrink),
        Partial(_from_where_it_got),
        Partial(_caps_over, rounds),
    )


def _first_cap(initial: Any, dtype: Any) -> Cap:
    return Cap(jnp.asarray(initial, dtype), jnp.ones((), dtype), jnp.int32(0))


def _excess(cap: Cap, delta: Array) -> Array:
    return jnp.sum(jnp.maximum(jnp.abs(delta) - cap.tau, 0))


def _under_cap(cap: Cap, value: Array, success: Array) -> tuple[Array, Array]:
    found = success & (value < 1e-4 * cap.const)
    return found, found


def _next_cap(shrink: Any, cap: Cap, found: Array, size: Array) -> Cap:
    tau = jnp.where(found, shrink * jnp.minimum(cap.tau, size), cap.tau)
    return Cap(jnp.where(found, cap.const, 2 * cap.const), tau, cap.round + 1)


def _from_where_it_got(x: Array, point: Array) -> Array:
    return point


def _caps_over(rounds: Any, cap: Cap) -> Array:
    return (cap.tau <= 1 / 256) | (cap.const > 20) | (cap.round >= rounds)
