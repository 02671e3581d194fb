"""sigma-zero: a minimum-norm attack in L0 by the gradient of a smooth count of the changed coordinates."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets.attacks.parts.calling import as_pytree, check_rows, check_steps, checked_logits, row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.minimum_norm import annealed, box_width, finite, spread, wide_a_row
from jaxnets.attacks.parts.ranking import nearer, nothing_found, within
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import margin, succeeded
from jaxnets.threats import L0, check_one_a_row, sizes
from jaxnets.types import Array, LogitsFn, Loss


def sigma_zero(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: L0,
    steps: int = 1000,
    loss: Loss = margin,
    step_size: Any = 1.0,
    sigma: Any = 0.001,
    threshold: Any = 0.3,
    threshold_step: Any = 0.01,
) -> Array:
    """The fewest changed coordinates found by Adam on a loss and a smooth count, with small changes set to zero.

    Of ``d`` coordinates, with ``u`` the perturbation over the width of the box, every step lowers
    ``-loss(x + delta) [goal not reached] + mean_i u_i^2 / (u_i^2 + sigma)``: its gradient over its largest entry goes
    through Adam, and ``u`` back to the box. Then entries with ``|u_i|`` under a threshold become zero. The threshold
    moves by ``threshold_step`` times the step size, up where the goal was reached and down where not. The step size
    falls along a cosine to a tenth. The cost is ``steps`` input gradients and one evaluation.

    Args:
      key: one key, or one a row ``[B]``; only a `Stochastic` model draws.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box, which must be finite.
      target: what ``loss`` takes: classes ``[B]``.
      threat: `L0`; epsilon, which may be infinite, limits what is returned and not where the attack looks.
      steps: number of gradients, at least 1; static.
      loss: raised until the goal is reached; `losses.targeted` for a targeted one.
      step_size: the first step of Adam, in widths of the box, scalar or ``[B]``, as all that follow.
      sigma: how smooth the count is, in squared widths of the box.
      threshold: the first threshold, in widths of the box.
      threshold_step: how far it moves, as a fraction of the step size.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype: the successful perturbation with the fewest coordinates, or the clean row
      where none was found within epsilon. A row whose goal is reached without one is returned as it is.

    Raises:
      ValueError: for shapes, dtypes or a threat that do not fit, an infinite box, or fewer than one step.

    Cinà et al. 2024, https://arxiv.org/abs/2402.01879.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 3), 0.5), jnp.array([0])
    >>> logits_fn = lambda x: x[:, :2] * jnp.array([2, 1])
    >>> x_adv = sigma_zero(jax.random.key(0), logits_fn, x, y, threat=jn.L0(jnp.inf), steps=100)
    >>> print((x_adv != x).sum())
    1
    """
    check_rows(x, target)
    check_steps("sigma_zero", steps)
    if not isinstance(threat, L0):
        raise ValueError(f"sigma_zero supports L0 alone, got {threat}: fmn takes Linf, L2, L1 and L0")
    box_width("sigma_zero", threat, unless="its steps and thresholds are fractions of it")
    numbers = {"step_size": step_size, "sigma": sigma, "threshold": threshold, "threshold_step": threshold_step}
    check_one_a_row(x, epsilon=threat.epsilon, **numbers)
    return _sigma_zero(
        key, as_pytree(logits_fn), x, target, threat, as_pytree(loss), tuple(numbers.values()), steps=steps
    )


@partial(jax.jit, static_argnames="steps")
def _sigma_zero(key, logits_fn, x, target, threat, loss, numbers, *, steps):
    lengths, sigma, first_threshold, threshold_step = (wide_a_row(number, x) for number in numbers)
    keys, adam = row_keys(key, len(x)), optax.scale_by_adam()
    width = threat.upper - threat.lower

    def look(number, carry):
        delta, moments, threshold, length, best = carry
        x_t = jnp.clip(x + delta, threat.lower, threat.upper)
        gradient, logits = input_gradient(redrawn(logits_fn, keys, number), loss, x_t, target)
        success = succeeded(loss, logits, target)
        best = nearer(best, x_t, success, sizes(threat, x_t, x))
        # Of the units of u: delta = width u.
        uphill = jnp.where(spread(success, x) > 0, 0, -width * finite(gradient)) + _count_slope(delta / width, sigma)
        step, moments = adam.update(_to_largest(uphill), moments)
        delta = jnp.clip(x + delta - width * spread(length, x) * step, threat.lower, threat.upper) - x
        length = annealed(lengths, lengths / 10, number, steps)
        threshold = jnp.clip(threshold + jnp.where(success, 1, -1) * threshold_step * length, 0, 1)
        return jnp.where(jnp.abs(delta) < width * spread(threshold, x), 0, delta), moments, threshold, length, best

    carry = jnp.zeros_like(x), adam.init(x), first_threshold, lengths, nothing_found(x)
    delta, *_, best = jax.lax.fori_loop(0, steps, look, carry)
    x_last = jnp.clip(x + delta, threat.lower, threat.upper)
    logits = checked_logits(redrawn(logits_fn, keys, steps)(x_last), x)
    best = nearer(best, x_last, succeeded(loss, logits, target), sizes(threat, x_last, x))
    return within(best, threat, x)


def _count_slope(u: Array, sigma: Array) -> Array:
    """The gradient of every row's ``mean_i u_i^2 / (u_i^2 + sigma)``."""
    smooth, size = spread(sigma, u), u[0].size
    return 2 * u * smooth / (u**2 + smooth) ** 2 / size


def _to_largest(gradient: Array) -> Array:
    """Every row over its largest entry; zero stays zero."""
    largest = jnp.max(jnp.abs(gradient), axis=range(1, gradient.ndim), keepdims=True)
    return gradient / jnp.where(largest > 0, largest, 1)
