"""Attacks that follow the gradient of a loss with respect to the input: one step, and many."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, check_finite, check_rows, check_steps, row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.ranking import better, candidate, nothing_yet
from jaxnets.attacks.parts.rules import Rule, steepest
from jaxnets.attacks.parts.start import Start, at_clean, uniform
from jaxnets.attacks.parts.stochastic import expected_logits, redrawn
from jaxnets.losses import cross_entropy
from jaxnets.threats import Threat, a_row, check_one_a_row, each_row
from jaxnets.types import Array, LogitsFn, Loss

_STEEPEST = steepest()


def fgsm(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = at_clean,
) -> Array:
    """Fast gradient (sign) method: one steepest step, ``project(x_0 + step_size * direction(grad loss(x_0)))``.

    With ``start=uniform`` (or `uniform_unclipped`) and ``step_size = 1.25 epsilon`` it is the attack of fast
    adversarial training.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: the ball and the box.
      loss: raised by the attack; `losses.targeted` for a targeted one.
      step_size: length of the step in the threat's norm, scalar or ``[B]``; epsilon unless given.
      start: where the gradient is taken.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype.

    Raises:
      ValueError: for shapes or dtypes that do not fit.

    Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572; Wong et al. 2020, https://arxiv.org/abs/2001.03994.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> print(fgsm(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1)))
    [[0.4 0.6]]
    """
    check_rows(x, target)
    check_finite("fgsm", threat)
    step_size = threat.epsilon if step_size is None else step_size
    check_one_a_row(x, epsilon=threat.epsilon, step_size=step_size)
    return _fgsm(key, as_pytree(logits_fn), x, target, threat, step_size, as_pytree(loss), as_pytree(start))


def pgd(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 40,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = uniform,
    rule: Rule = _STEEPEST,
) -> Array:
    """Projected gradient: ``x_{t+1} = project(x_t + step_size * direction(grad loss(x_t)))``, each row's best iterate.

    Best is first whether the attack has succeeded there, then how high the loss is; the start counts as an iterate. The
    cost is ``steps`` input gradients and one evaluation.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: the ball and the box.
      steps: number of gradients, at least 1; static.
      loss: raised by the attack; `losses.targeted` for a targeted one.
      step_size: length of a step in the threat's norm, scalar or ``[B]``; ``2.5 epsilon / steps`` unless given.
      start: the first iterate.
      rule: what is done with a gradient; the steepest step of the threat's norm unless given.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype.

    Raises:
      ValueError: for shapes or dtypes that do not fit, or fewer than one step.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> print(pgd(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1), steps=5))
    [[0.4 0.6]]
    """
    check_rows(x, target)
    check_steps("pgd", steps)
    check_finite("pgd", threat)
    step_size = 2.5 * threat.epsilon / steps if step_size is None else step_size
    check_one_a_row(x, epsilon=threat.epsilon, step_size=step_size)
    arguments = (as_pytree(logits_fn), x, target, threat, step_size, as_pytree(loss), as_pytree(start), rule)
    return _pgd(key, *arguments, steps=steps)


@jax.jit
def _fgsm(key, logits_fn, x, target, threat, step_size, loss, start):
    keys = row_keys(key, len(x))
    x_0 = start(keys, threat, x)
    gradient, _ = input_gradient(redrawn(logits_fn, keys, 0), loss, x_0, target)
    return _step(threat, a_row(step_size, x), x, x_0, gradient, _STEEPEST, ())[0]


@partial(jax.jit, static_argnames="steps")
def _pgd(key, logits_fn, x, target, threat, step_size, loss, start, rule, *, steps):
    keys, lengths = row_keys(key, len(x)), a_row(step_size, x)

    def ascend(number, carry):
        x_t, state, best = carry
        place = jax.vmap(rule.place)(state, lengths, x_t)
        gradient, logits = input_gradient(redrawn(logits_fn, keys, number), loss, place, target)
        # A start may lie outside the box and a rule may look elsewhere: gradients are taken there, but no candidates.
        allowed = _in_box(threat, x_t) & jnp.all(place == x_t, axis=range(1, x.ndim))
        best = better(best, candidate(loss, x_t, logits, target), among=allowed)
        return *_step(threat, lengths, x, x_t, gradient, rule, state), best

    carry = start(keys, threat, x), jax.vmap(rule.init)(x), nothing_yet(x)
    x_last, _, best = jax.lax.fori_loop(0, steps, ascend, carry)
    logits = expected_logits(redrawn(logits_fn, keys, steps), x_last)
    return better(best, candidate(loss, x_last, logits, target)).x


def _step(threat: Threat, lengths: Array, x: Array, x_t: Array, gradient: Array, rule: Rule, state: Any):
    """The next iterates and states of all rows; a coordinate whose gradient is NaN has none."""
    gradient = jnp.nan_to_num(gradient)

    def one(threat, state, length, x_t, gradient):
        return rule.step(state, threat, length, gradient, x_t)

    of_rows = replace(threat, epsilon=a_row(threat.epsilon, x))  # pyright: ignore
    z, state = jax.vmap(one)(of_rows, state, lengths, x_t, gradient)
    return each_row(type(threat).project, threat, z, x), state


def _in_box(threat: Threat, x: Array) -> Array:
    return jnp.all((x >= threat.lower) & (x <= threat.upper), axis=range(1, x.ndim))
