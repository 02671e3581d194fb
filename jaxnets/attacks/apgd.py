"""Auto-PGD: projected gradient with momentum that sets its own step sizes, on any loss and towards many classes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.attacks.parts.apgd_steps import Point, Schedule, schedule_of
from jaxnets.attacks.parts.calling import as_pytree, check_finite, check_rows, check_steps, checked_logits, row_keys
from jaxnets.attacks.parts.classes import check_classes, likeliest_others
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.minimum_norm import box_width
from jaxnets.attacks.parts.ranking import Candidate, better, candidate, nothing_yet
from jaxnets.attacks.parts.start import Start
from jaxnets.attacks.parts.stochastic import expected_logits, redrawn
from jaxnets.losses import cross_entropy, dlr_targeted
from jaxnets.threats import L1, Threat, a_row, check_one_a_row
from jaxnets.types import Array, LogitsFn, Loss


def apgd(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 100,
    loss: Loss = cross_entropy,
    start: Start | None = None,
) -> Array:
    """Auto-PGD: projected gradient with momentum whose step size each row halves for itself; the row's best iterate.

    In Linf and L2, from a length of ``2 epsilon`` on,

        ``z = project(x_t + length * direction(grad loss(x_t)))``
        ``x_{t+1} = project(x_t + 0.75 (z - x_t) + 0.25 (x_t - x_{t-1}))``

    and after 22, 41, 57, 70, 80, 87, 93, 99% of the steps a row halves its length, and goes back to its point of
    highest loss, where fewer than 75% of the steps since the last look raised the loss, or where neither the length nor
    the highest loss has changed since then.

    In L1 a step goes along the largest entries of the gradient, two thirds as many as the point of highest loss has
    changed coordinates. Where that number falls by 5% the length is set to epsilon and the row goes back to that point,
    otherwise the length is divided by 1.5, to a tenth of epsilon at least. The first 30% of the steps look for a start
    in a ball of 3 epsilon, the next 30% in one of 2 epsilon.

    The result is ranked first by whether the attack has succeeded, then by the loss. The cost is ``steps`` input
    gradients and one evaluation (three in L1). Restarts are `restarts`.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: the ball and the box, Linf, L2 or L1; finite epsilon.
      steps: number of gradients, at least 1; static.
      loss: raised by the attack: `cross_entropy`, `dlr`; `losses.targeted` for a targeted one.
      start: the first iterate, which is projected on ball and box; unless given `uniform` in Linf and L2, in L1
        normal noise projected on the ball of 3 epsilon.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype.

    Raises:
      ValueError: for shapes or dtypes that do not fit, fewer than one step, or a threat of another kind.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690; in L1 Croce and Hein 2021, https://arxiv.org/abs/2103.01208.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> print(apgd(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1), steps=5))
    [[0.4 0.6]]
    """
    _check(x, target, threat, steps, start, "apgd")
    arguments = (as_pytree(logits_fn), x, target, threat, as_pytree(loss), None if start is None else as_pytree(start))
    return _apgd(key, *arguments, steps=steps)


def apgd_targeted(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 100,
    classes: int = 9,
    loss: Callable[[Array, Array, Array], Array] = dlr_targeted,
    start: Start | None = None,
) -> Array:
    """Auto-PGD towards each of the likeliest other classes at once (APGD-T); a row's best result.

    Every row is attacked ``classes`` times, towards those that have the largest logits at the clean point but for
    ``target``: one batch ``[B * classes]``. Any class but ``target`` counts as success: this is an untargeted attack.
    The cost is that of `apgd` times ``classes``, and one evaluation.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: the true classes ``[B]``.
      threat: the ball and the box, Linf, L2 or L1; finite epsilon.
      steps: number of gradients towards each class, at least 1; static.
      classes: how many classes are tried, ``1 <= classes <= K - 1``; static.
      loss: ``(logits[..., K], target, wanted) -> [...]``, raised by the attack.
      start: as for `apgd`.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype.

    Raises:
      ValueError: as `apgd`, for targets that are no classes, or for more classes than there are others.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.5, 0.4, 0.3, 0.2]]), jnp.array([0])
    >>> attack = partial(apgd_targeted, threat=jn.Linf(0.1), steps=5, classes=3)
    >>> print(attack(jax.random.key(0), lambda x: x, x, y)[0, :2])
    [0.4 0.5]
    """
    _check(x, target, threat, steps, start, "apgd_targeted")
    check_classes(target, "apgd_targeted")
    arguments = (as_pytree(logits_fn), x, target, threat, as_pytree(loss), None if start is None else as_pytree(start))
    return _apgd_targeted(key, *arguments, steps=steps, classes=classes)


def _check(x: Array, target: Array, threat: Threat, steps: int, start: Start | None, name: str) -> None:
    check_rows(x, target)
    check_steps(name, steps)
    check_one_a_row(x, epsilon=threat.epsilon)
    check_finite(name, threat)
    if start is None and isinstance(threat, L1):
        box_width(name, threat, "its starts in L1 are drawn from all of the box, give a start")


@partial(jax.jit, static_argnames="steps")
def _apgd(key, logits_fn, x, target, threat, loss, start, *, steps):
    return _ascend(row_keys(key, len(x)), logits_fn, x, target, threat, loss, start, steps).x


@partial(jax.jit, static_argnames=("steps", "classes"))
def _apgd_targeted(key, logits_fn, x, target, threat, loss, start, *, steps, classes):
    keys = row_keys(key, len(x))
    logits = checked_logits(redrawn(logits_fn, keys, 0)(x), x)
    others = logits.shape[1] - 1
    if not 1 <= classes <= others:
        raise ValueError(f"there are {others} other classes in logits of shape {list(logits.shape)}, got {classes=}")
    wanted = likeliest_others(logits, target, classes)
    each = lambda leaf: jnp.repeat(leaf, classes, axis=0)  # noqa: E731
    keys = jax.vmap(jax.random.fold_in)(each(keys), jnp.tile(jnp.arange(classes), len(x)))
    threat = replace(threat, epsilon=each(a_row(threat.epsilon, x)))
    towards = Partial(loss, wanted=wanted.ravel())
    found = _ascend(keys, logits_fn, each(x), each(target), threat, towards, start, steps)
    return _best_of_each(found, len(x))


def _best_of_each(found: Candidate, rows: int) -> Array:
    """Of candidates ``[B * T]`` the best of each row."""
    success, loss = found.success.reshape(rows, -1), found.loss.reshape(rows, -1)
    among = success == jnp.any(success, axis=1, keepdims=True)
    best = jnp.argmax(jnp.where(among, loss, -jnp.inf), axis=1)
    # Where no loss is above minus infinity, the first is as good as any.
    return found.x.reshape(rows, -1, *found.x.shape[1:])[jnp.arange(rows), best]


def _ascend(keys, logits_fn, x, target, threat, loss, start, steps) -> Candidate:
    """Every row's best point of the last phase. Each phase starts where the one before had the highest loss."""
    schedule = schedule_of(threat, steps)
    threat = replace(threat, epsilon=a_row(threat.epsilon, x))
    lengths, widths = (jnp.asarray(values) for values in zip(*schedule.phases, strict=True))
    firsts = jnp.cumsum(lengths + 1) - lengths - 1

    def phase(number, carry):
        wide = replace(threat, epsilon=(threat.epsilon * widths[number]).astype(x.dtype))
        x_0 = jax.vmap(type(threat).project)(wide, carry[0], x)
        model = lambda step: redrawn(logits_fn, keys, firsts[number] + step)  # noqa: E731
        return _phase(schedule, number, lengths[number], model, x, x_0, target, wide, loss)

    wide = replace(threat, epsilon=(threat.epsilon * widths[0]).astype(x.dtype))
    x_0 = (start or schedule.start)(keys, wide, x).astype(x.dtype)
    return jax.lax.fori_loop(0, len(lengths), phase, (x_0, nothing_yet(x)))[1]


def _phase(schedule: Schedule, number, steps, model, x, x_0, target, threat, loss: Loss) -> tuple[Array, Candidate]:
    """The points of the highest loss, from which rows go back, and the best ones, for which success comes first."""

    def ascend(step, carry):
        x_t, state, top, best = carry
        gradient, logits = input_gradient(model(step), loss, x_t, target)
        new = candidate(loss, x_t, logits, target)
        # Where the model has no derivative there is no step either.
        now = Point(x_t, jnp.nan_to_num(gradient), new.loss.astype(top.loss.dtype))
        top = _higher(top, now)
        x_next, state = jax.vmap(schedule.move, in_axes=(None, 0, 0, 0, 0, 0))(step, state, threat, x, now, top)
        return x_next, state, top, better(best, new)

    state = jax.vmap(schedule.init, in_axes=(None, 0, 0, 0))(number, threat, x, x_0)
    nothing = nothing_yet(x)
    top = Point(x_0, jnp.zeros_like(x), nothing.loss)
    x_last, _, top, best = jax.lax.fori_loop(0, steps, ascend, (x_0, state, top, nothing))
    last = candidate(loss, x_last, expected_logits(model(steps), x_last), target)
    top = _higher(top, Point(x_last, top.gradient, last.loss.astype(top.loss.dtype)))
    return top.x, better(best, last)


def _higher(top: Point, now: Point) -> Point:
    """Row by row the one of higher loss; the first on ties and where the second's loss is NaN."""
    take = now.loss > top.loss
    per_row = take.reshape(-1, *[1] * (now.x.ndim - 1))
    x, gradient = (jnp.where(per_row, a, b) for a, b in zip(now[:2], top[:2], strict=True))
    return Point(x, gradient, jnp.where(take, now.loss, top.loss))
