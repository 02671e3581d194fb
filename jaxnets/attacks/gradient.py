"""Attacks that follow the gradient of a loss with respect to the input: one step, and many."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.calling import as_pytree, check_rows, checked_logits, row_keys
from jaxnets.attacks.ranking import better, candidate, nothing_yet
from jaxnets.attacks.start import Start, at_clean, uniform
from jaxnets.losses import cross_entropy
from jaxnets.threats import Threat, check_one_a_row, each_row
from jaxnets.types import Array, LogitsFn, Loss


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
      start: where the first gradient is taken.

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
    if steps < 1:
        raise ValueError(f"pgd takes at least one step, got steps={steps}")
    step_size = 2.5 * threat.epsilon / steps if step_size is None else step_size
    check_one_a_row(x, epsilon=threat.epsilon, step_size=step_size)
    arguments = (as_pytree(logits_fn), x, target, threat, step_size, as_pytree(loss), as_pytree(start))
    return _pgd(key, *arguments, steps=steps)


@jax.jit
def _fgsm(key, logits_fn, x, target, threat, step_size, loss, start):
    x_0 = start(row_keys(key, len(x)), threat, x)
    gradient, _ = input_gradient(logits_fn, loss, x_0, target)
    return _step(threat, step_size, x, x_0, gradient)


@partial(jax.jit, static_argnames="steps")
def _pgd(key, logits_fn, x, target, threat, step_size, loss, start, *, steps):
    def ascend(_, carry):
        x_t, best = carry
        gradient, logits = input_gradient(logits_fn, loss, x_t, target)
        # A start may lie outside the box: a gradient is taken there, but it is no candidate.
        best = better(best, candidate(loss, x_t, logits, target), among=_in_box(threat, x_t))
        return _step(threat, step_size, x, x_t, gradient), best

    x_0 = start(row_keys(key, len(x)), threat, x)
    x_last, best = jax.lax.fori_loop(0, steps, ascend, (x_0, nothing_yet(x)))
    return better(best, candidate(loss, x_last, checked_logits(logits_fn(x_last), x), target)).x


def input_gradient(logits_fn: LogitsFn, loss: Loss, x: Array, target: Array) -> tuple[Array, Array]:
    """The gradient ``[B, ...]`` of every row's own loss with respect to that row, and the logits ``[B, K]``.

    Rows are summed, never averaged: a mean would scale gradients by the batch size.
    """

    def total(z):
        logits = checked_logits(logits_fn(z), z)
        return jnp.sum(loss(logits, target)), logits

    return jax.grad(total, has_aux=True)(x)


def _step(threat: Threat, step_size: Any, x: Array, x_t: Array, gradient: Array) -> Array:
    lengths = jnp.broadcast_to(jnp.asarray(step_size, x.dtype), len(x))

    def one(threat, length, x, x_t, gradient):
        return threat.project(x_t + length * threat.direction(gradient, x_t), x)

    return each_row(one, threat, lengths, x, x_t, gradient)


def _in_box(threat: Threat, x: Array) -> Array:
    return jnp.all((x >= threat.lower) & (x <= threat.upper), axis=range(1, x.ndim))
