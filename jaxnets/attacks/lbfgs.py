"""The first attack of all: L-BFGS in the box, for a constant that a search makes as small as it can be."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import check_between
from jaxnets.attacks.parts.penalty import Minimiser, binary_search, nearest_by_penalty, to_box, to_widths
from jaxnets.losses import margin
from jaxnets.threats import L2, Threat
from jaxnets.types import Array, LogitsFn, Loss


def lbfgs(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 100,
    confidence: Any = 0.0,
    initial_const: Any = 1e-2,
    rounds: int = 9,
    loss: Loss = margin,
    memory: int = 10,
    tolerance: Any = 1e-4,
) -> Array:
    """Box-constrained L-BFGS: the smallest success on the way to several minima of
    ``|delta|_2^2 + const * max(confidence - loss(x + delta), 0)``.

    The quasi-Newton direction of `optax.scale_by_lbfgs` acts on the coordinates that are not held at a face of the box,
    and a step is halved until the objective falls (Armijo). Every step, halved or not, costs one forward and one
    backward pass. ``const`` is found by a binary search of each row, and at the end the segment between the
    clean row and its result is searched for a smaller success. The paper's loss is the cross-entropy of a wanted class,
    with the norm for the penalty; here it is a margin, cut where the goal is reached, with the norm squared, which is
    smooth at zero.

    Args:
      key: one key, or one a row ``[B]``; used for `Stochastic` models alone.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: classes ``[B]``.
      threat: L2. A row whose smallest success is beyond epsilon is given back clean.
      steps: gradients a constant, at least 1.
      confidence: what the loss must be above zero for a success, scalar or ``[B]``.
      initial_const: the first constant, times ten until one succeeds.
      rounds: number of constants, at least 1.
      loss: positive where the goal is reached; ``losses.targeted(margin)`` for a targeted attack.
      memory: pairs of differences that L-BFGS keeps, at least 1; static.
      tolerance: a row leaves a constant when a tenth of the steps has lowered its objective by less than this share; a
        negative number: never.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype; the clean row where nothing within epsilon was found.

    Raises:
      ValueError: for shapes, dtypes or numbers that do not fit, or another threat.

    Szegedy et al. 2014, https://arxiv.org/abs/1312.6199.

    >>> import jax, jaxnets as jn
    >>> x, y = jnp.array([[0.6, 0.5]]), jnp.array([0])
    >>> x_adv = lbfgs(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(jnp.inf), steps=20)
    >>> bool(jnp.abs(x_adv - jnp.array([[0.55, 0.55]])).max() < 1e-3)
    True
    """
    if not isinstance(threat, L2):
        raise ValueError(f"lbfgs supports the threat L2, got {type(threat).__name__}")
    check_between(0, jnp.inf, initial_const=initial_const)
    return nearest_by_penalty(
        "lbfgs",
        key,
        logits_fn,
        x,
        target,
        threat=threat,
        minimiser=quasi_newton(memory),
        search=binary_search(initial_const, rounds),
        loss=loss,
        confidence=confidence,
        steps=steps,
        rounds=rounds,
        tolerance=tolerance,
    )


class Trial(NamedTuple):
    """The point held with its objective and gradient, the direction from it, and the share of it to try next."""

    delta: Array
    value: Array
    gradient: Array
    direction: Array
    share: Array
    memory: Any


def quasi_newton(memory: int) -> Minimiser:
    """L-BFGS directions with backtracking, projected on the box."""
    return Minimiser(Partial(partial(_start, memory)), Partial(_trial), Partial(partial(_step, memory)))


def _start(memory: int, threat: Threat, x: Array, start: Array) -> Trial:
    delta = to_widths(threat, x, start)
    infinity, zero = jnp.full((), jnp.inf, delta.dtype), jnp.zeros_like(delta)
    state = optax.scale_by_lbfgs(memory).init(delta)
    return Trial(delta, infinity, zero, zero, jnp.ones_like(infinity), _typed(state, delta.dtype))


def _typed(state: Any, dtype: Any) -> Any:
    """Optax keeps some numbers in the default precision, whatever that of the data."""
    cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    return jax.tree.map(cast, state)


def _trial(state: Trial, threat: Threat, x: Array) -> Array:
    return to_box(threat, x, state.delta + state.share * state.direction)


def _step(memory: int, state: Trial, threat: Threat, x: Array, point: Array, value: Array, gradient: Array) -> Trial:
    delta = to_widths(threat, x, point)
    enough = state.value + 1e-4 * jnp.vdot(state.gradient, delta - state.delta)
    halved = state._replace(share=state.share / 2)
    # The first point has nothing to compare with.
    accept = (value <= enough) | jnp.isinf(state.value)
    return jax.tree.map(
        partial(jnp.where, accept), _onward(memory, state, threat, point, delta, value, gradient), halved
    )


def _onward(memory, state, threat, point, delta, value, gradient) -> Trial:
    held = ((point <= threat.lower) & (gradient > 0)) | ((point >= threat.upper) & (gradient < 0))
    free = jnp.where(held, 0, gradient)
    # Curvature is learnt from the free coordinates: a gradient that a face holds back is none.
    newton, kept = optax.scale_by_lbfgs(memory).update(free, state.memory, delta)
    newton = jnp.where(held, 0, cast(Array, newton))
    # Differences across a kink can make a direction of ascent; those of rounding alone one of any length, and a success
    # far off would pass for this constant's.
    sound = (jnp.vdot(newton, gradient) > 0) & (jnp.linalg.norm(newton) <= 100 * jnp.linalg.norm(free))
    direction = jnp.where(sound, -newton, -free)
    return Trial(delta, value, gradient, direction, jnp.ones_like(value), _typed(kept, delta.dtype))
