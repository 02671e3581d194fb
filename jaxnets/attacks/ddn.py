"""DDN: a minimum-norm attack in L2 whose radius moves by itself, whatever direction the gradient gives."""

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
from jaxnets.losses import cross_entropy, succeeded
from jaxnets.threats import L2, check_one_a_row, sizes
from jaxnets.types import Array, LogitsFn, Loss

# Steps of full length: a step without what the box forbids found larger perturbations, by 2% on MNIST.
_EVERYWHERE = L2(0.0, -float("inf"), float("inf"))


def ddn(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: L2,
    steps: int = 100,
    loss: Loss = cross_entropy,
    radius: Any = None,
    step_size: Any = None,
    gamma: Any = 0.05,
    levels: Any = jnp.inf,
) -> Array:
    """Decoupled direction and norm: the smallest L2 perturbation found by a radius that shrinks on success, else grows.

    ``r_{t+1} = (1 - gamma) r_t`` where ``x + d_t`` has succeeded, else ``(1 + gamma) r_t``; ``d_{t+1}`` is
    ``r_{t+1} v / |v|_2`` with ``v = d_t + a_t g / |g|_2``, cut to the box. The step ``a_t`` falls along a cosine to a
    hundredth of the first. A row without a gradient moves in a random direction. The cost is ``steps`` input gradients
    and one evaluation.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: `L2`; epsilon, which may be infinite, limits what is returned and not where the attack looks.
      steps: number of gradients, at least 1; static.
      loss: raised by the attack; `losses.targeted` for a targeted one.
      radius: the first radius, scalar or ``[B]``; the width of the box unless given.
      step_size: L2 length of the first step, scalar or ``[B]``; the width of the box unless given.
      gamma: by what fraction the radius moves.
      levels: how many values a coordinate may have, evenly spaced from one side of the box to the other: 256 for
        images of one byte, as in the paper; unless given, any value.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype: the smallest successful perturbation, or the clean row where none was found
      within epsilon. A row whose goal is reached without one is returned as it is.

    Raises:
      ValueError: for shapes, dtypes or a threat that do not fit, fewer than one step or two levels, or where
        ``radius`` or ``step_size`` are not given and the box is infinite.

    Rony et al. 2019, https://arxiv.org/abs/1811.09600.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> x_adv = ddn(jax.random.key(0), lambda x: x + jnp.array([0.2, 0]), x, y, threat=jn.L2(jnp.inf))
    >>> print(jnp.linalg.norm(x_adv - x).round(2))  # 0.2 / sqrt(2)
    0.14
    """
    check_rows(x, target)
    check_steps("ddn", steps)
    if not isinstance(threat, L2):
        raise ValueError(f"ddn supports L2 alone, got {threat}: fmn takes Linf, L2, L1 and L0")
    if isinstance(levels, (int, float)) and levels < 2:
        raise ValueError(f"ddn needs at least 2 levels, got levels={levels}")
    if radius is None or step_size is None:
        width = box_width("ddn", threat, unless="or give radius and step_size")
        radius, step_size = (width if value is None else value for value in (radius, step_size))
    check_one_a_row(x, epsilon=threat.epsilon, radius=radius, step_size=step_size, gamma=gamma)
    numbers = radius, step_size, gamma, levels
    return _ddn(key, as_pytree(logits_fn), x, target, threat, as_pytree(loss), numbers, steps=steps)


@partial(jax.jit, static_argnames="steps")
def _ddn(key, logits_fn, x, target, threat, loss, numbers, *, steps):
    *numbers, levels = numbers
    first_radius, lengths, gamma = (wide_a_row(number, x) for number in numbers)
    keys, furthest = row_keys(key, len(x)), largest_sizes(threat, x)
    otherwise = random_directions(keys, x)

    def look(number, carry):
        x_t, radius, best = carry
        gradient, logits = input_gradient(redrawn(logits_fn, keys, number), loss, x_t, target)
        success = succeeded(loss, logits, target)
        best = nearer(best, x_t, success, sizes(threat, x_t, x))
        radius = jnp.minimum(radius * jnp.where(success, 1 - gamma, 1 + gamma), furthest)
        moved = spread(annealed(lengths, lengths / 100, number, steps), x)
        moved = x_t - x + moved * unit_step(finite(gradient), otherwise, _EVERYWHERE, x_t)
        return _quantised(_at_radius(radius, moved, threat, x), levels, threat), radius, best

    x_last, _, best = jax.lax.fori_loop(0, steps, look, (x, first_radius, nothing_found(x)))
    logits = checked_logits(redrawn(logits_fn, keys, steps)(x_last), x)
    best = nearer(best, x_last, succeeded(loss, logits, target), sizes(threat, x_last, x))
    return within(best, threat, x)


def _at_radius(radius: Array, delta: Array, threat: L2, x: Array) -> Array:
    """``x + radius delta / |delta|_2``, cut to the box; ``x`` where ``delta`` is zero."""
    length = jax.vmap(threat.size)(delta)
    scale = radius / jnp.where(length > 0, length, 1)
    return jnp.clip(x + spread(scale, x) * delta, threat.lower, threat.upper)


def _quantised(z: Array, levels: Array, threat: L2) -> Array:
    """The nearest of ``levels`` evenly spaced values; ``z`` where there are infinitely many."""
    step = jnp.asarray((threat.upper - threat.lower) / (levels - 1), z.dtype)
    rounded = threat.lower + step * jnp.round((z - threat.lower) / jnp.where(step > 0, step, 1))
    return jnp.where(step > 0, jnp.clip(rounded, threat.lower, threat.upper), z)
