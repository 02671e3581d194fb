"""The elastic-net attack: accelerated proximal gradient on ``const * shortfall + |delta|_2^2 + beta |delta|_1``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import check_between
from jaxnets.attacks.parts.penalty import Minimiser, binary_search, nearest_by_penalty, to_box, to_widths
from jaxnets.losses import margin
from jaxnets.threats import L1, L2, Threat
from jaxnets.types import Array, LogitsFn, Loss


def ead(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 1000,
    step_size: Any = 0.01,
    beta: Any = 1e-3,
    confidence: Any = 0.0,
    initial_const: Any = 1e-3,
    rounds: int = 9,
    loss: Loss = margin,
    decision: Any = None,
    tolerance: Any = 1e-4,
) -> Array:
    """Elastic-net attack (EAD): the smallest success on the way to several minima of
    ``const * max(confidence - loss(x + delta), 0) + |delta|_2^2 + beta |delta|_1``.

    A step is ``d_{k+1} = S(e_k - alpha_k gradient)`` and ``e_{k+1} = d_{k+1} + k / (k + 3) (d_{k+1} - d_k)``, cut to
    the box, with ``alpha_k = step_size sqrt(1 - k / steps)`` and ``S(z) = sign(z) max(|z| - beta, 0)`` (the paper's
    soft threshold: not times ``alpha_k``). The gradient is that of the smooth part at ``e_k``, and ``e_k`` is also the
    point that may become the result, so a step costs one forward and one backward pass. ``const`` is found by a binary
    search of each row. Lengths count in widths of the box (``delta = (x_adv - x) / (upper - lower)``), so that the
    constants mean the same in any units.

    Args:
      key: one key, or one a row ``[B]``; used for `Stochastic` models alone.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: classes ``[B]``.
      threat: L1 (or L2); its size decides which success is smallest, and where that is beyond epsilon the row is given
        back clean.
      steps: gradients a constant, at least 1.
      step_size: ``alpha_0``.
      beta: soft threshold of a step: larger is sparser.
      confidence: what the loss must be above zero for a success, scalar or ``[B]``.
      initial_const: the first constant, times ten until one succeeds.
      rounds: number of constants (the paper's binary search steps), at least 1.
      loss: positive where the goal is reached; ``losses.targeted(margin)`` for a targeted attack.
      decision: ``delta -> scalar``, in the units of the data, what is smallest: the threat's size (the paper's L1 rule)
        unless given; `elastic_net` is the other rule.
      tolerance: a row leaves a constant when a tenth of the steps has lowered its objective by less than this share; a
        negative number: never.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype; the clean row where nothing within epsilon was found.

    Raises:
      ValueError: for shapes, dtypes or numbers that do not fit, or another threat.

    Chen et al. 2018, https://arxiv.org/abs/1709.04114.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.6, 0.5]]), jnp.array([0])
    >>> x_adv = ead(jax.random.key(0), lambda x: x, x, y, threat=jn.L1(jnp.inf), steps=100)
    >>> bool(0.1 < jnp.abs(x_adv - x).sum() < 0.105)
    True
    """
    if not isinstance(threat, L1 | L2):
        raise ValueError(f"ead supports the threats L1 and L2, got {type(threat).__name__}")
    check_between(0, jnp.inf, step_size=step_size, initial_const=initial_const)
    check_between(-jnp.inf, jnp.inf, beta=beta)
    return nearest_by_penalty(
        "ead",
        key,
        logits_fn,
        x,
        target,
        threat=threat,
        minimiser=fista(step_size, beta, steps),
        search=binary_search(initial_const, rounds, Partial(_penalty, beta)),
        loss=loss,
        confidence=confidence,
        steps=steps,
        rounds=rounds,
        tolerance=tolerance,
        distance=decision,
    )


def elastic_net(beta: Any) -> Any:
    """The decision rule EN: ``|delta|_2^2 + beta |delta|_1``.

    >>> print(elastic_net(0.5)(jnp.array([1.0, -2.0])))
    6.5
    """
    return Partial(_elastic_net, beta)


def _elastic_net(beta: Any, delta: Array) -> Array:
    return jnp.sum(delta**2) + beta * jnp.sum(jnp.abs(delta))


def _penalty(beta: Any, setting: Any, delta: Array) -> Array:
    """The elastic net, with the gradient of its smooth part: the soft threshold does the rest."""
    return jnp.sum(delta**2) + beta * jnp.sum(jnp.abs(jax.lax.stop_gradient(delta)))


class Momentum(NamedTuple):
    """Perturbations in widths of the box: the iterate, the point ahead of it, and how many steps were taken."""

    delta: Array
    ahead: Array
    count: Array


def fista(step_size: Any, beta: Any, steps: Any) -> Minimiser:
    """Accelerated proximal gradient steps with the L1 norm's soft threshold, in the box."""
    return Minimiser(Partial(_start), Partial(_ahead), Partial(_threshold_step, step_size, beta, steps))


def _start(threat: Threat, x: Array, start: Array) -> Momentum:
    delta = to_widths(threat, x, start)
    return Momentum(delta, delta, jnp.int32(0))


def _ahead(state: Momentum, threat: Threat, x: Array) -> Array:
    return to_box(threat, x, state.ahead)


def _threshold_step(step_size, beta, steps, state, threat, x, point, value, gradient) -> Momentum:
    count = state.count.astype(gradient.dtype)
    z = to_widths(threat, x, point) - step_size * jnp.sqrt(jnp.maximum(1 - count / steps, 0)) * gradient
    shrunk = jnp.sign(z) * jnp.maximum(jnp.abs(z) - beta, 0)
    # Back from the box, a coordinate that did not move stays exactly zero.
    delta = to_widths(threat, x, to_box(threat, x, shrunk))
    return Momentum(delta, delta + count / (count + 3) * (delta - state.delta), state.count + 1)
