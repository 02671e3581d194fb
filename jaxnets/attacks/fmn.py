"""FMN: a minimum-norm attack in Linf, L2, L1 and L0 whose radius is estimated from the distance to the boundary."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, check_rows, check_steps, checked_logits, row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.minimum_norm import (
    annealed,
    box_width,
    finite,
    largest_sizes,
    random_directions,
    spread,
    unit_step,
    wide_a_row,
)
from jaxnets.attacks.parts.ranking import nearer, nothing_found, within
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import margin, succeeded
from jaxnets.threats import L0, L1, L2, Linf, Threat, check_one_a_row, each_row, sizes
from jaxnets.types import Array, LogitsFn, Loss

_DUALS = {Linf: L1, L2: L2, L1: Linf}
_LAST_GAMMA = 0.001


def fmn(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 100,
    loss: Loss = margin,
    step_size: Any = None,
    gamma: Any = 0.05,
) -> Array:
    """Fast minimum norm: the smallest perturbation found by projected gradients in a ball whose radius adapts.

    ``d_{t+1} = project(d_t + a_t g / |g|_2)`` on ball and box, for a norm from no less than the ball's surface. Until
    the goal is reached once, the radius is a little more than the linear estimate of the boundary,
    ``r_{t+1} = (1 + gamma_t) (|d_t| + |loss| / |g|_*)`` with the dual norm; from then on ``(1 + gamma_t) r_t`` where it
    is not reached, and ``min((1 - gamma_t) r_t, smallest so far)`` where it is. In L0 the radius starts at 1 and moves
    by whole coordinates: at least one, or the fraction ``gamma_t``. ``a_t`` and ``gamma_t`` fall along a cosine, to
    ``a_0 / 100`` and 0.001. Coordinates on the box do not move against it, and a row without a gradient moves in a
    random direction. The cost is ``steps`` input gradients and one evaluation.

    The surface, the little more (at the estimate itself rounding decides who has crossed), the box and the random
    direction are additions to the paper.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``.
      threat: `Linf`, `L2`, `L1` or `L0`; epsilon, which may be infinite, limits what is returned and not where the
        attack looks.
      steps: number of gradients, at least 1; static.
      loss: raised by the attack, and zero at the boundary for the estimate to hold: `losses.margin`, or
        `losses.targeted` of it.
      step_size: L2 length of the first step, whatever the norm, scalar or ``[B]``; the width of the box unless given.
      gamma: by what fraction the radius moves at first.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype: the smallest successful perturbation, or the clean row where none was found
      within epsilon. A row whose goal is reached without one is returned as it is.

    Raises:
      ValueError: for shapes, dtypes or a threat that do not fit, fewer than one step, or where ``step_size`` is not
        given and the box is infinite.

    Pintor et al. 2021, https://arxiv.org/abs/2102.12827.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> x_adv = fmn(jax.random.key(0), lambda x: x + jnp.array([0.2, 0]), x, y, threat=jn.Linf(jnp.inf))
    >>> print(f"{jnp.abs(x_adv - x).max():.2f}")
    0.10
    """
    check_rows(x, target)
    check_steps("fmn", steps)
    if not isinstance(threat, (Linf, L2, L1, L0)):
        raise ValueError(f"fmn supports Linf, L2, L1 and L0, got {threat}")
    if step_size is None:
        step_size = box_width("fmn", threat, unless="or give step_size")
    check_one_a_row(x, epsilon=threat.epsilon, step_size=step_size, gamma=gamma)
    return _fmn(key, as_pytree(logits_fn), x, target, threat, as_pytree(loss), step_size, gamma, steps=steps)


@partial(jax.jit, static_argnames="steps")
def _fmn(key, logits_fn, x, target, threat, loss, step_size, gamma, *, steps):
    lengths, gammas = wide_a_row(step_size, x), wide_a_row(gamma, x)
    keys, furthest = row_keys(key, len(x)), largest_sizes(threat, x)
    otherwise, next_radius = random_directions(keys, x), _whole_radius if isinstance(threat, L0) else _radius

    def look(number, carry):
        x_t, radius, best = carry
        gradient, logits = input_gradient(redrawn(logits_fn, keys, number), loss, x_t, target)
        gradient, success, size = finite(gradient), succeeded(loss, logits, target), sizes(threat, x_t, x)
        best = nearer(best, x_t, success, size)
        shift = annealed(gammas, _LAST_GAMMA, number, steps)
        estimate = partial(_estimate, threat, size, gradient, loss(logits, target))
        radius = jnp.minimum(next_radius(radius, shift, success, best.size, estimate), furthest)
        step = spread(annealed(lengths, lengths / 100, number, steps), x)
        z = x_t + step * unit_step(gradient, otherwise, threat, x_t)
        return each_row(_project, replace(threat, epsilon=radius), z, x), radius, best

    carry = x, jnp.ones_like(furthest), nothing_found(x)
    x_last, _, best = jax.lax.fori_loop(0, steps, look, carry)
    logits = checked_logits(redrawn(logits_fn, keys, steps)(x_last), x)
    best = nearer(best, x_last, succeeded(loss, logits, target), sizes(threat, x_last, x))
    return within(best, threat, x)


def _project(threat: Threat, z: Array, x: Array) -> Array:
    """``z`` in ball and box; a point inside a ball of a norm is moved out to its surface first.

    The paper leaves it inside. Used up, the radius finds smaller perturbations for the same steps: by 3% in L2 on
    MNIST, and in rows where none was found before.
    """
    if isinstance(threat, L0):
        return threat.project(z, x)
    size = threat.size(z - x)
    return threat.project(x + (z - x) * jnp.maximum(threat.epsilon / jnp.where(size > 0, size, 1), 1), x)


def _radius(radius, shift, success, smallest, estimate):
    shrunk = jnp.minimum(radius * (1 - shift), smallest)
    return jnp.where(success, shrunk, (1 + shift) * jnp.where(jnp.isfinite(smallest), radius, estimate()))


def _whole_radius(radius, shift, success, smallest, estimate):
    shrunk = jnp.minimum(jnp.minimum(radius - 1, jnp.floor(radius * (1 - shift))), smallest)
    grown = jnp.maximum(radius + 1, jnp.floor(radius * (1 + shift)))
    return jnp.maximum(jnp.where(success, shrunk, grown), 1)


def _estimate(threat, size, gradient, value):
    """How large the perturbation would be at the boundary of a linear model; infinite where there is no slope."""
    slope = jax.vmap(_DUALS[type(threat)](0.0).size)(gradient)
    return jnp.where(slope > 0, size + jnp.abs(value) / jnp.where(slope > 0, slope, 1), jnp.inf)
