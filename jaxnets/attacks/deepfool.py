"""DeepFool: steps to the linearised boundary until it is crossed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, check_between, check_rows, check_steps, checked_logits, row_keys
from jaxnets.attacks.parts.classes import check_classes, likeliest_others
from jaxnets.attacks.parts.hyperplane import Hyperplane, distance, linearised
from jaxnets.attacks.parts.ranking import nearer, nothing_found, within
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import margin, succeeded
from jaxnets.threats import L2, Linf, Threat, check_one_a_row, sizes
from jaxnets.types import Array, LogitsFn, Loss


def deepfool(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 50,
    classes: int = 9,
    overshoot: Any = 0.02,
    loss: Loss = margin,
) -> Array:
    """DeepFool: the smallest step over the nearest linearised boundary, again until a boundary is crossed.

    With the nearest boundary at ``x_t`` linearised as ``<w, delta> = gap``, from ``x_0 = x``::

        d       = gap w / |w|_2^2 (L2), gap sign(w) / |w|_1 (Linf)
        x_{t+1} = clip(x_t + (1 + overshoot) d)

    and each row's first adversarial ``x_t``. The paper has no box; where it cuts steps short, a step has at least the
    size ``overshoot |x_t - x|`` before it is cut. The loop ends with the last row, and costs a forward pass and
    ``classes`` backward passes a step.

    Args:
      key: one key, or one a row ``[B]``; used by models that draw.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: classes ``[B]``: the right ones, or the wanted ones for a targeted loss.
      threat: `Linf` or `L2`: the norm, the box, and the size beyond which a result does not count, which may be
        infinite. (The smallest step in L1 changes one coordinate, which the box soon stops: see `fab` for L1.)
      steps: largest number of steps, at least 1; static.
      classes: only boundaries to so many classes are considered, those with the highest logits at ``x``: one backward
        pass a step for each; static.
      overshoot: share of the perturbation that is added to cross the boundary.
      loss: only its goal is used: a `losses.targeted` one looks for points of the class ``target``, by the boundary
        between it and the class that leads it.

    Returns:
      ``x_adv[B, ...]``: ``x`` itself where ``x`` is adversarial, and where no step crossed a boundary within epsilon.

    Raises:
      ValueError: for shapes or dtypes that do not fit, another threat, fewer than one step or class.

    Moosavi-Dezfooli et al. 2016, https://arxiv.org/abs/1511.04599.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.75, 0.25]]), jnp.array([0])
    >>> print(deepfool(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(jnp.inf)).argmax(axis=1))
    [1]
    """
    check_rows(x, target)
    if not isinstance(threat, (Linf, L2)):
        raise ValueError(f"deepfool takes an Linf or L2 threat, got {threat!r}")
    check_classes(target, "deepfool")
    check_one_a_row(x, epsilon=threat.epsilon)
    check_steps("deepfool", steps)
    check_between(-jnp.inf, jnp.inf, overshoot=overshoot)
    arguments = (as_pytree(logits_fn), x, target, threat, as_pytree(loss), jnp.asarray(overshoot, x.dtype))
    return _deepfool(key, *arguments, steps=steps, classes=classes)


@partial(jax.jit, static_argnames=("steps", "classes"))
def _deepfool(key, logits_fn, x, target, threat, loss, overshoot, *, steps, classes):
    keys = row_keys(key, len(x))
    others = likeliest_others(checked_logits(redrawn(logits_fn, keys, 0)(x), x), target, classes)
    advance = jax.vmap(partial(_advance, threat, overshoot))

    def step(carry):
        number, x_t, done = carry
        logits, plane = linearised(threat, loss, redrawn(logits_fn, keys, number + 1), x_t, target, others)
        done |= succeeded(loss, logits, target)
        return number + 1, advance(x, x_t, done, plane), done

    def unfinished(carry):
        number, _, done = carry
        return (number < steps) & ~jnp.all(done)

    _, x_t, done = jax.lax.while_loop(unfinished, step, (0, x, jnp.zeros(len(x), bool)))
    done |= succeeded(loss, checked_logits(redrawn(logits_fn, keys, steps + 1)(x_t), x), target)
    return within(nearer(nothing_found(x), x_t, done, sizes(threat, x_t, x)), threat, x)


def _advance(threat: Threat, overshoot: Array, x: Array, x_t: Array, done: Array, plane: Hyperplane) -> Array:
    """The next iterate of one example; the same again where it is done or sees no boundary."""
    away = distance(threat, plane)
    # Where the box cuts steps short, iterates would approach the boundary for ever.
    length = jnp.maximum((1 + overshoot) * away, overshoot * threat.size(x_t - x)).astype(x.dtype)
    moved = x_t + length * _towards(threat, plane).astype(x.dtype)
    return jnp.where(done | ~jnp.isfinite(away), x_t, jnp.clip(moved, threat.lower, threat.upper))


def _towards(threat: Threat, plane: Hyperplane) -> Array:
    """The direction of size one that closes the gap fastest."""
    rising = plane.normal * jnp.sign(plane.gap).astype(plane.normal.dtype)
    if isinstance(threat, Linf):
        return jnp.sign(rising)
    length = threat.size(rising)
    return rising / jnp.where(length > 0, length, 1)
