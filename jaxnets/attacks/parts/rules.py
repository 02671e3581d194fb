"""Step rules: what an iterated attack does with a gradient. Each is written for one example.

A rule is a pytree of `jax.tree_util.Partial`s: a number in it is a leaf, so another one means no new trace.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import Partial

from jaxnets.threats import Threat
from jaxnets.types import Array


class Rule(NamedTuple):
    """How one example moves.

    Attributes:
      init: ``(x) -> state``.
      place: ``(state, length, x_t) -> point``, where the gradient is taken.
      step: ``(state, threat, length, gradient, x_t) -> (z, state)``; the attack projects ``z``.
    """

    init: Callable[[Array], Any]
    place: Callable[[Any, Array, Array], Array]
    step: Callable[[Any, Threat, Array, Array, Array], tuple[Array, Any]]


def steepest() -> Rule:
    """``x_t + length * direction(gradient)``: the step of PGD."""
    return Rule(Partial(_nothing), Partial(here), Partial(_steepest))


def momentum(decay: Any = 1.0) -> Rule:
    """``m <- decay * m + g / |g|_1`` and ``x_t + length * direction(m)``: the step of MI-FGSM.

    The sign (of any norm the direction) is taken of the sum, not of what is summed; a zero gradient adds nothing.

    Args:
      decay: how much of the sum so far is kept; 0 is `steepest`.

    Dong et al. 2018, https://arxiv.org/abs/1710.06081, equations 6 and 7.
    """
    return Rule(Partial(jnp.zeros_like), Partial(here), Partial(_momentum, decay))


def nesterov(decay: Any = 1.0) -> Rule:
    """`momentum`, its gradient taken ahead at ``x_t + length * decay * m``: the step of NI-FGSM.

    As in the authors' code, a flat gradient counts as one step: in Linf ``m`` sums ``g / mean |g|``. The paper writes
    ``g / |g|_1`` which, for ``n`` coordinates, would look one ``n``-th of a step ahead; the directions are the same.
    The point ahead may lie outside ball and box, and is no candidate for the result.

    Args:
      decay: how much of the sum so far is kept.

    Lin et al. 2020, https://arxiv.org/abs/1908.06281, equations 6 to 8.
    """
    return Rule(Partial(jnp.zeros_like), Partial(_ahead, decay), Partial(_nesterov, decay))


def by_optax(optimizer: optax.GradientTransformation) -> Rule:
    """``x_t + length * u``, where ``u`` is the optimizer's update for the negated gradient.

    Give the optimizer a learning rate of 1 (`optax.adam(1.0)`): the attack's ``step_size`` multiplies it, and may
    change without a new trace. Each row has a state of its own, so that clipping by a global norm is by that of the
    row. The optimizer is known by identity: keep it, and a jitted attack is not traced again.

    Args:
      optimizer: any transformation that takes ``(updates, state, params)``.

    >>> import optax
    >>> import jaxnets as jn
    >>> rule, x = by_optax(optax.adam(1.0)), jnp.zeros(2)
    >>> z, state = rule.step(rule.init(x), jn.Linf(1.0), 0.1, jnp.array([3.0, -0.5]), x)
    >>> print(z.round(3))
    [ 0.1 -0.1]
    """
    return Rule(Partial(optimizer.init), Partial(here), Partial(_by_optax, Partial(optimizer.update)))


def smoothed(kernel: Any, rule: Rule) -> Rule:
    """Any rule, given the gradient convolved with a kernel: the translation-invariant attacks (TI).

    It stands for the gradient of the mean loss over shifted images, shifts weighted by the kernel, and transfers better
    to other models. Rows must be images ``[H, W, C]``; beyond their edge the gradient counts as zero.

    Args:
      kernel: ``[k, k]``, ``k`` odd, laid on the gradient as it is, not turned round; `gaussian_kernel`.
      rule: what is done with the smoothed gradient.

    Raises:
      ValueError: for a kernel that is not ``[k, k]`` with odd ``k``; in the attack, for rows that are no images.

    Dong et al. 2019, https://arxiv.org/abs/1904.02884.
    """
    if jnp.ndim(kernel) != 2 or len(set(jnp.shape(kernel))) != 1 or len(kernel) % 2 == 0:
        raise ValueError(f"a kernel is [k, k] with odd k, got shape {list(jnp.shape(kernel))}")
    return rule._replace(step=Partial(_changed, Partial(_convolved, *_factors(kernel)), rule.step))


def normalized(rule: Rule) -> Rule:
    """Any rule, given ``g / mean |g|``: it does the same whatever the scale of the logits."""
    return rule._replace(step=Partial(_changed, Partial(_by_mean), rule.step))


def gaussian_kernel(size: int = 15, sigma: float | None = None) -> np.ndarray:
    """A Gaussian ``[size, size]`` that sums to one.

    Args:
      size: odd.
      sigma: standard deviation in pixels; ``(size // 2) / sqrt(3)``, as in Dong et al. 2019, unless given.

    Raises:
      ValueError: for an even size.

    >>> print(gaussian_kernel(3, 1.0)[1].round(1))
    [0.1 0.2 0.1]
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel has an odd size of at least 1, got size={size}")
    radius = size // 2
    width = max(radius, 1) / 3**0.5 if sigma is None else sigma
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    return np.asarray(np.outer(line, line) / line.sum() ** 2, np.float32)


def here(state: Any, length: Array, x_t: Array) -> Array:
    """The gradient is taken at the iterate."""
    return x_t


def flat_size(threat: Threat, x: Array) -> Array:
    """The size of a perturbation by one everywhere; one, as in Linf, where a threat allows none such."""
    size = threat.size(jnp.ones_like(x))
    return jnp.where(jnp.isfinite(size), size, 1)


def _nothing(x: Array) -> tuple[()]:
    return ()


def _steepest(state: Any, threat: Threat, length: Array, gradient: Array, x_t: Array) -> tuple[Array, Any]:
    return x_t + length * threat.direction(gradient, x_t), state


def _momentum(decay, state: Array, threat: Threat, length: Array, gradient: Array, x_t: Array) -> tuple[Array, Array]:
    state = (decay * state + _unit_sum(gradient)).astype(state.dtype)
    return _steepest((), threat, length, state, x_t)[0], state


def _ahead(decay: Any, state: Array, length: Array, x_t: Array) -> Array:
    return (x_t + length * decay * state).astype(x_t.dtype)


def _nesterov(decay, state: Array, threat: Threat, length: Array, gradient: Array, x_t: Array) -> tuple[Array, Array]:
    state = (decay * state + _by_mean(gradient) / flat_size(threat, gradient)).astype(state.dtype)
    return _steepest((), threat, length, state, x_t)[0], state


def _by_optax(update, state: Any, threat: Threat, length: Array, gradient: Array, x_t: Array) -> tuple[Array, Any]:
    updates, state = update(-gradient, state, x_t)
    return (x_t + length * updates).astype(x_t.dtype), state


def _changed(change, step, state: Any, threat: Threat, length: Array, gradient: Array, x_t: Array):
    return step(state, threat, length, change(gradient), x_t)


def _by_mean(gradient: Array) -> Array:
    return _unit_sum(gradient) * gradient.size


def _convolved(columns: Array, lines: Array, gradient: Array) -> Array:
    """``sum_r D_r g A_r^T`` for each channel of ``[H, W, C]``, with banded matrices of the factors ``[r, k]``.

    On a CPU far faster than a convolution of one channel.
    """
    if gradient.ndim != 3:
        raise ValueError(f"a smoothed gradient is that of an image [H, W, C], got a row of shape {gradient.shape}")
    down = jax.vmap(partial(_band, gradient.shape[0]))(jnp.asarray(columns, gradient.dtype))
    across = jax.vmap(partial(_band, gradient.shape[1]))(jnp.asarray(lines, gradient.dtype))
    return jnp.einsum("rih,hwc,rjw->ijc", down, gradient, across, precision=jax.lax.Precision.HIGHEST)


def _band(side: int, line: Array) -> Array:
    """The matrix ``[side, side]`` that convolves a line of pixels, zeros beyond its ends, with ``line[k]``."""
    place = jnp.arange(side)[None, :] - jnp.arange(side)[:, None] + len(line) // 2
    return jnp.where((place >= 0) & (place < len(line)), line[jnp.clip(place, 0, len(line) - 1)], 0)


def _factors(kernel: Any) -> tuple[Any, Any]:
    """Columns and lines ``[r, k]`` whose outer products sum to the kernel: one of each for a Gaussian."""
    if isinstance(kernel, Tracer):
        left, values, right = jnp.linalg.svd(kernel)
        return left.T * values[:, None], right
    left, values, right = np.linalg.svd(np.asarray(kernel, np.float64))
    rank = max(int(np.sum(values > 1e-7 * values[0])), 1)
    return jnp.asarray(left.T[:rank] * values[:rank, None]), jnp.asarray(right[:rank])


def _unit_sum(gradient: Array) -> Array:
    """``g / |g|_1`` at any scale of ``g``, zero where ``g`` is zero."""
    largest = jnp.max(jnp.abs(gradient))
    scaled = gradient / jnp.where(largest > 0, largest, 1)
    # A sum in half precision overflows for images of 65,504 coordinates.
    total = jnp.sum(jnp.abs(scaled), dtype=jnp.promote_types(scaled.dtype, jnp.float32))
    return (scaled / jnp.where(total > 0, total, 1)).astype(gradient.dtype)
