"""Fast adaptive boundary attack: steps to the linearised boundary that are drawn towards the clean point."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, check_between, check_rows, check_steps, checked_logits, row_keys
from jaxnets.attacks.parts.classes import check_classes, likeliest_others
from jaxnets.attacks.parts.hyperplane import (
    Hyperplane,
    boundary_to,
    check_norm,
    linearised,
    seen_from,
    step_to,
)
from jaxnets.attacks.parts.minimum_norm import box_width, shortened, spread
from jaxnets.attacks.parts.ranking import Nearest, nearer, nothing_found, within
from jaxnets.attacks.parts.start import Start, at_clean
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import margin, succeeded
from jaxnets.threats import L1, Threat, check_one_a_row, each_row, sizes
from jaxnets.types import Array, LogitsFn, Loss


def fab(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 100,
    loss: Loss = margin,
    start: Start = at_clean,
    alpha_max: Any = 0.1,
    eta: Any = 1.05,
    beta: Any = 0.9,
) -> Array:
    """Fast adaptive boundary attack (FAB): the smallest perturbation that it finds, of every row.

    With ``d_t`` and ``d_0`` the smallest steps inside the box, from ``z_t`` and from ``x``, to the nearest of the
    boundaries linearised at ``z_t``::

        z_t     = x + beta (x_t - x) where x_t is adversarial, x_t elsewhere
        alpha   = min(|d_t| / (|d_t| + |d_0|), alpha_max)
        x_{t+1} = clip((1 - alpha) (z_t + eta d_t) + alpha (x + eta d_0))

    At the end the segment between the clean row and its result is searched for a nearer one. The cost is ``steps + 1``
    times two forward and ``K - 1`` backward passes, and a few more forward passes. `fab_targeted` has one backward pass
    a step, and tries every class by itself.

    Args:
      key: one key, or one a row ``[B]``; used by ``start`` and by models that draw.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: classes ``[B]``: the right ones, or the wanted ones for a targeted loss.
      threat: `Linf`, `L2` or `L1`: the norm, the box, and the size beyond which a result does not count, which may be
        infinite.
      steps: number of iterates at which gradients are taken, at least 1; static.
      loss: only its goal is used: a `losses.targeted` one looks for points of the class ``target``, by the boundary
        between it and the class that leads it.
      start: the first iterate; `halfway` for further runs.
      alpha_max: largest weight of the way that begins at the clean point, in [0, 1].
      eta: how far past the boundary a step goes, at least 1.
      beta: what is left of an adversarial perturbation before the next step, in (0, 1).

    Returns:
      ``x_adv[B, ...]``: the nearest adversarial point; ``x`` itself where ``x`` is adversarial, and where none was
      found or the nearest lies beyond epsilon.

    Raises:
      ValueError: for shapes or dtypes that do not fit, another threat, fewer than one step or than 2 classes.

    Croce and Hein 2020, https://arxiv.org/abs/1907.02044 (without restarts, and with a plain bisection for
    their final search).

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.75, 0.25]]), jnp.array([0])
    >>> print(fab(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(jnp.inf), steps=30).round(2))
    [[0.5 0.5]]
    """
    _check(x, target, threat, steps, "fab")
    pull = _pull(x, alpha_max, eta, beta)
    return _fab(key, as_pytree(logits_fn), x, target, threat, as_pytree(loss), as_pytree(start), pull, steps=steps)


def fab_targeted(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 100,
    classes: int = 9,
    start: Start = at_clean,
    alpha_max: Any = 0.1,
    eta: Any = 1.05,
    beta: Any = 0.9,
) -> Array:
    """FAB-T: `fab` once towards each of the likeliest other classes, and the nearest point of all these runs.

    A run knows one boundary, that between the right class and its own, so that a step costs one backward pass however
    many classes there are. A point counts in whatever wrong class it lies: the attack is untargeted. All runs of all
    rows are one batch of ``B min(classes, K - 1)`` rows.

    Args:
      key, logits_fn, x, threat, steps, start, alpha_max, eta, beta: as for `fab`.
      target: the right classes ``[B]``.
      classes: number of runs a row, towards the classes with the highest logits at ``x``; static.

    Returns:
      ``x_adv[B, ...]``, as `fab` does.

    Raises:
      ValueError: as `fab` does, and for fewer than one class to run to.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690; https://arxiv.org/abs/1907.02044.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.75, 0.25]]), jnp.array([0])
    >>> print(fab_targeted(jax.random.key(0), lambda x: x, x, y, threat=jn.L1(jnp.inf), steps=30).round(2).sum())
    1.0
    """
    _check(x, target, threat, steps, "fab_targeted")
    arguments = (as_pytree(logits_fn), x, target, threat, as_pytree(start), _pull(x, alpha_max, eta, beta))
    return _fab_targeted(key, *arguments, steps=steps, classes=classes)


def halfway(keys: Array, threat: Threat, x: Array) -> Array:
    """A `Start` in a random direction, at half of epsilon (at most half the size of the box), cut to the box.

    What the paper does in runs after the first, which begins at the clean point: ``worst_of(partial(fab, threat=t),
    restarts(partial(fab, threat=t, start=halfway), 4, nearest=t), nearest=t)``. Where an earlier run found something,
    its sizes are the epsilon of the next.
    """

    def one(threat, key, x):
        offset = replace(threat, epsilon=jnp.ones((), x.dtype)).sample(key, jnp.zeros_like(x))
        radius = jnp.minimum(threat.epsilon, threat.size(jnp.full_like(x, threat.upper - threat.lower))) / 2
        size = threat.size(offset)
        return jnp.clip(x + radius * offset / jnp.where(size > 0, size, 1), threat.lower, threat.upper)

    return each_row(one, threat, keys, x)


class _Pull(NamedTuple):
    alpha_max: Array
    eta: Array
    beta: Array


class _Rows(NamedTuple):
    """What the runs have each one of."""

    keys: Array
    x: Array
    target: Array


def _pull(x: Array, alpha_max: Any, eta: Any, beta: Any) -> _Pull:
    check_between(-jnp.inf, jnp.inf, alpha_max=alpha_max, eta=eta, beta=beta)
    return _Pull(*(jnp.asarray(value, x.dtype) for value in (alpha_max, eta, beta)))


def _check(x: Array, target: Array, threat: Threat, steps: int, name: str) -> None:
    check_rows(x, target)
    check_norm(threat, name)
    check_classes(target, name)
    check_one_a_row(x, epsilon=threat.epsilon)
    check_steps(name, steps)
    if isinstance(threat, L1):
        box_width(name, threat, "in L1 its steps go to the box's corners")


@partial(jax.jit, static_argnames="steps")
def _fab(key, logits_fn, x, target, threat, loss, start, pull, *, steps):
    rows = _Rows(row_keys(key, len(x)), x, target)
    clean = checked_logits(redrawn(logits_fn, rows.keys, 0)(x), x)
    others = likeliest_others(clean, target)

    def boundary(model, x_t):
        return linearised(threat, loss, model, x_t, target, others)

    found = _run(rows, logits_fn, boundary, start(rows.keys, threat, x), threat, loss, pull, steps)
    return within(nearer(found, x, succeeded(loss, clean, target), jnp.zeros(len(x))), threat, x)


@partial(jax.jit, static_argnames=("steps", "classes"))
def _fab_targeted(key, logits_fn, x, target, threat, start, pull, *, steps, classes):
    keys = row_keys(key, len(x))
    clean = checked_logits(redrawn(logits_fn, keys, 0)(x), x)
    others = likeliest_others(clean, target, classes)
    runs = others.shape[1]
    own_keys = jax.vmap(lambda key: jax.random.split(key, runs))(keys).ravel()
    rows = _Rows(own_keys, *(jnp.repeat(leaf, runs, axis=0) for leaf in (x, target)))

    def boundary(model, x_t):
        return boundary_to(model, x_t, rows.target, others.ravel())

    wide = replace(threat, epsilon=jnp.repeat(jnp.broadcast_to(threat.epsilon, len(x)), runs))  # pyright: ignore
    found = _run(rows, logits_fn, boundary, start(own_keys, wide, rows.x), wide, margin, pull, steps)
    found = jax.tree.map(lambda leaf: leaf.reshape(len(x), runs, *leaf.shape[1:]), found)
    best = jnp.argmin(found.size, axis=1)
    found = jax.tree.map(lambda leaf: leaf[jnp.arange(len(x)), best], found)
    return within(nearer(found, x, succeeded(margin, clean, target), jnp.zeros(len(x))), threat, x)


def _run(
    rows: _Rows,
    logits_fn: LogitsFn,
    boundary: Callable[[LogitsFn, Array], tuple[Array, Hyperplane]],
    x_0: Array,
    threat: Threat,
    loss: Loss,
    pull: _Pull,
    steps: int,
) -> Nearest:
    """The nearest adversarial point of every row."""
    advance, away = jax.vmap(partial(_advance, threat, pull)), lambda point: sizes(threat, point, rows.x)

    def succeeds(number, point):
        logits = checked_logits(redrawn(logits_fn, rows.keys, number + 1)(point), point)
        return succeeded(loss, logits, rows.target)

    def step(number, carry):
        z, plane, best = carry
        x_t = advance(rows.x, z, plane)
        success = succeeds(number, x_t)
        best = nearer(best, x_t, success, away(x_t))
        z = x_t - spread((1 - pull.beta) * success, x_t) * (x_t - rows.x)
        return z, boundary(redrawn(logits_fn, rows.keys, number + 1), z)[1], best

    # A step ends with its gradient: XLA's CPU backend would compute the last part of a gradient within the step again
    # for every sum that it goes into. The first plane is none, to which the way is zero; the last is not used.
    shapes = jax.eval_shape(lambda z: boundary(redrawn(logits_fn, rows.keys, 0), z)[1], x_0)
    none = jax.tree.map(jnp.zeros_like, shapes)
    _, _, best = jax.lax.fori_loop(0, steps + 1, step, (x_0, none, nothing_found(rows.x)))
    return shortened(best, rows.x, lambda halving, point: succeeds(steps + 1 + halving, point), away)


def _advance(threat: Threat, pull: _Pull, x: Array, z: Array, plane: Hyperplane) -> Array:
    """The next iterate of one example."""
    step, clean_step = step_to(threat, z, plane), step_to(threat, x, seen_from(x, plane, z))
    size, clean_size = threat.size(step), threat.size(clean_step)
    total = size + clean_size
    alpha = jnp.minimum(size / jnp.where(total > 0, total, 1), pull.alpha_max)
    moved = (1 - alpha) * (z + pull.eta * step) + alpha * (x + pull.eta * clean_step)
    return jnp.clip(moved, threat.lower, threat.upper)
