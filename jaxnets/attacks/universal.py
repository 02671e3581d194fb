"""One perturbation for a whole data set: projected stochastic gradient ascent on the mean loss."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.rules import Rule, steepest
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import cross_entropy
from jaxnets.threats import Threat
from jaxnets.types import Array, LogitsFn, Loss

_STEEPEST = steepest()


def universal(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    epochs: int = 10,
    batch_size: int = 100,
    loss: Loss = cross_entropy,
    most: Any = 9.0,
    step_size: Any = None,
    rule: Rule = _STEEPEST,
) -> Array:
    """One perturbation that raises the mean loss of all rows: ``max_delta mean_i min(loss(clip(x_i + delta)), most)``.

    A step a batch, ``delta <- project(delta + step_size * direction(grad))``. `apply_universal` adds the result to any
    rows. Under `threats.Masked`, with ``x`` photographs of one object, it is a sticker for that object.

    Args:
      key: one key: it shuffles, and draws for a `Stochastic` model.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: the data set, clean rows ``[N, ...]`` inside the threat's box.
      target: what ``loss`` takes, with ``N`` rows.
      threat: the ball around zero for the perturbation; the box for the perturbed rows. Its epsilon is a scalar.
      epochs: passes through the data, at least 1; static.
      batch_size: rows a step, at least 1; static.
      loss: raised; `losses.targeted` for a targeted one.
      most: a row's loss counts no further than this, so that rows that are lost already do not rule the mean.
      step_size: length of a step in the threat's norm; ``epsilon / sqrt(number of steps)`` unless given.
      rule: what is done with a gradient, for instance `rules.momentum`.

    Returns:
      ``delta[...]`` of one row's shape, inside the ball.

    Raises:
      ValueError: for shapes or dtypes that do not fit, no epochs or empty batches.

    Moosavi-Dezfooli et al. 2017, https://arxiv.org/abs/1610.08401; this form: Shafahi et al. 2020,
    https://arxiv.org/abs/1811.11304.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((8, 2), 0.5), jnp.zeros(8, int)
    >>> print(universal(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1), batch_size=4))
    [-0.1  0.1]
    """
    check_rows(x, target)
    check_passes(epochs, batch_size)
    if jnp.ndim(threat.epsilon) != 0:
        raise ValueError(f"one perturbation has one epsilon, got epsilon of shape {list(jnp.shape(threat.epsilon))}")
    batch_size = min(batch_size, len(x))
    if step_size is None:
        step_size = threat.epsilon / (epochs * -(-len(x) // batch_size)) ** 0.5
    apply = Partial(_add_to_row, threat.lower, threat.upper)
    loss = Partial(_at_most, as_pytree(loss), most)
    # The perturbation's own box holds all that can matter to a row.
    wide = replace(threat, lower=threat.lower - threat.upper, upper=threat.upper - threat.lower)  # pyright: ignore
    data = Data(as_pytree(logits_fn), loss, x, target)
    return ascend(key, data, jnp.zeros_like(x[0]), apply, wide, rule, step_size, epochs=epochs, batch_size=batch_size)


def apply_universal(delta: Array, x: Array, *, threat: Threat) -> Array:
    """``clip(x_i + delta)`` to the threat's box, for rows ``x[B, ...]`` and ``delta[...]``."""
    return jnp.clip(x + delta, threat.lower, threat.upper)


class Data(NamedTuple):
    """What is attacked: the model, the loss that is raised, and all rows."""

    logits_fn: LogitsFn
    loss: Loss
    x: Array
    target: Array


@partial(jax.jit, static_argnames=("epochs", "batch_size"))
def ascend(
    key: Array,
    data: Data,
    start: Array,
    apply: Callable[[Array, Array, Array], Array],
    threat: Threat,
    rule: Rule,
    step_size: Any,
    *,
    epochs: int,
    batch_size: int,
) -> Array:
    """Raises the mean loss of ``apply(key, thing, row)`` over all rows by changing the thing, from ``start[...]``.

    ``threat`` bounds the thing, around its start. Every epoch visits every row once, in an order of its own.
    """
    order_key, draw_key = jax.random.split(key)
    length = jnp.asarray(step_size, start.dtype)

    def step(carry, batch):
        thing, state = carry
        number, rows = batch
        step_key, place = jax.random.fold_in(draw_key, number), rule.place(state, length, thing)
        gradient = _batch_gradient(step_key, data, apply, place, rows)
        z, state = rule.step(state, threat, length, jnp.nan_to_num(gradient), thing)
        return (threat.project(z, start), state), None

    batches = _shuffled(order_key, len(data.x), epochs, batch_size)
    (thing, _), _ = jax.lax.scan(step, (start, rule.init(start)), (jnp.arange(len(batches)), batches))
    return thing


def check_passes(epochs: int, batch_size: int) -> None:
    """Raises ValueError unless there is at least one epoch of batches of at least one row."""
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"needs at least one epoch and one row a batch, got epochs={epochs}, batch_size={batch_size}")


def _batch_gradient(key: Array, data: Data, apply: Any, thing: Array, rows: Array) -> Array:
    """The gradient of the summed losses of ``data.x[rows]`` with respect to the thing; row N and on count as none."""
    apply_keys, model_keys = (row_keys(one, len(rows)) for one in jax.random.split(key))
    x, target = data.x.at[rows].get(mode="clip"), data.target.at[rows].get(mode="clip")
    x_adv, pull_back = jax.vjp(lambda thing: jax.vmap(apply, (0, None, 0))(apply_keys, thing, x), thing)
    gradient, _ = input_gradient(redrawn(data.logits_fn, model_keys, 0), data.loss, x_adv, target)
    real = (rows < len(data.x)).reshape(-1, *[1] * (x.ndim - 1))
    return pull_back(jnp.where(real, gradient, 0))[0]


def _shuffled(key: Array, rows: int, epochs: int, batch_size: int) -> Array:
    """Row numbers ``[steps, batch_size]``; numbers from ``rows`` on fill each epoch's last batch."""
    padded = -(-rows // batch_size) * batch_size
    orders = jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(key, epochs))
    return jnp.pad(orders, ((0, 0), (0, padded - rows)), constant_values=rows).reshape(-1, batch_size)


def _add_to_row(lower: Any, upper: Any, key: Array, delta: Array, row: Array) -> Array:
    return _clip(jnp.asarray(lower, row.dtype), jnp.asarray(upper, row.dtype), row + delta)


@jax.custom_vjp
def _clip(lower: Array, upper: Array, z: Array) -> Array:
    """``clip`` whose gradient is that of the inner side, so that a pixel at or beyond the box can come back into it."""
    return jnp.clip(z, lower, upper)


def _clip_forward(lower: Array, upper: Array, z: Array):
    return jnp.clip(z, lower, upper), (lower, upper, z)


def _clip_backward(residuals: tuple[Array, Array, Array], cotangent: Array):
    lower, upper, z = residuals
    leaves = ((z >= upper) & (cotangent > 0)) | ((z <= lower) & (cotangent < 0))
    return jnp.zeros_like(lower), jnp.zeros_like(upper), jnp.where(leaves, 0, cotangent)


_clip.defvjp(_clip_forward, _clip_backward)


def _at_most(loss: Loss, most: Any, logits: Array, target: Array) -> Array:
    return jnp.minimum(loss(logits, target), most)
