"""Lower bounds of a network's margins by going back through its tape: CROWN, of which interval arithmetic is a part."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxnets.certificates.rules import Interval
from jaxnets.certificates.tape import Step, Tape
from jaxnets.folds import root
from jaxnets.models.layers.convolution import conv_general_dilated, pulled_back
from jaxnets.types import Array

Relax = Callable[[Step, Array], tuple[list[tuple[Interval, Array]], Array]]
"""What is done about a step that is not affine, whose only result ``r`` is multiplied by ``A[K, ...]``:
``(step, A) -> ([(operand, coefficients[K, ...]), ...], bias[K])`` such that ``A (r - r') >= sum coefficients
(operand - operand') + bias`` for all values inside, where a prime is an interval's centre."""


def least_margins(tape: Tape, y: Array, relax: Relax) -> Array:
    """Lower bounds of ``z_y - z_k`` for every class ``k`` at once, ``[K]``, zero for ``y`` itself.

    The margins are a linear function of the logits. Written as a function of the values before each step in turn, in
    deviations from the intervals' centres, affine steps change its coefficients alone: no layer's bounds enter until a
    step that is not affine, and the last layers are merged with the specification (Gowal et al. 2018).

    Args:
      tape: of one row.
      y: its class, a scalar.
      relax: what replaces a step that is not affine.
    """
    classes = jnp.arange(tape.logits.lower.shape[1])
    wanted = ((classes == y) * 1.0 - jnp.eye(len(classes))).astype(tape.logits.lower.dtype)[:, None]
    bound = weighted(wanted, tape.logits.center)
    pending: dict[Interval, Array] = {tape.logits: wanted}
    for step in reversed(tape.steps):
        arrived = [pending.pop(result, None) for result in step.results]
        if all(coefficients is None for coefficients in arrived):
            continue
        if step.affine:
            parts = _transposed(step, arrived)
        else:
            parts, bias = relax(step, arrived[0])  # pyright: ignore
            bound += bias
        for operand, coefficients in parts:
            pending[operand] = pending[operand] + coefficients if operand in pending else coefficients
    # What is left are the input, and the logits where they do not depend on it.
    for value, coefficients in pending.items():
        bound -= spread(coefficients, value)
    return jnp.where(classes == y, 0, bound)


def at_intervals(step: Step, coefficients: Array) -> tuple[list[tuple[Interval, Array]], Array]:
    """A `Relax` that goes no further: what the step gives is anything in its interval."""
    return [], -spread(coefficients, step.results[0])


def spread(coefficients: Array, value: Interval) -> Array:
    """How far ``coefficients[K, ...]`` times a value differs at most from that at the interval's centre, ``[K]``."""
    if value.norm == 1:
        return jnp.max(jnp.abs(coefficients * value.radius), axis=range(1, coefficients.ndim))
    if value.norm == 2:
        return root(weighted(jnp.square(coefficients), jnp.square(value.radius)))
    return weighted(jnp.abs(coefficients), value.radius)


def weighted(coefficients: Array, values: Array) -> Array:
    """``coefficients[K, ...]`` times ``values[...]``, summed: ``[K]``."""
    # As a product of matrices, many times faster on a CPU than a sum; by default some devices round its factors.
    return jnp.tensordot(coefficients, values, values.ndim, precision="highest")


def _convolved_back(step: Step, coefficients: Array) -> Array:
    """As `_transposed`, by a convolution that is fast on CPUs in branches and loops, and so are its gradients."""
    lhs, rhs = step.operands
    image = lhs.lower.shape[1:]  # pyright: ignore
    flat = coefficients.reshape(-1, *coefficients.shape[2:])
    pulled = pulled_back(flat, image, rhs, **step.bind.keywords)  # pyright: ignore
    return pulled.reshape(*coefficients.shape[:2], *image)


def _transposed(step: Step, arrived: list[Array | None]) -> list[tuple[Interval, Array]]:
    """The coefficients of an affine step's operands, from those of its results."""
    places = [place for place, operand in enumerate(step.operands) if isinstance(operand, Interval)]
    if places == [0] and getattr(step.bind, "func", None) is conv_general_dilated:
        return [(step.operands[0], _convolved_back(step, arrived[0]))]  # pyright: ignore

    def of_intervals(*values):
        operands = list(step.operands)
        for place, value in zip(places, values, strict=True):
            operands[place] = value
        results = step.bind(*operands)
        return list(results) if isinstance(results, list | tuple) else [results]

    _, pull = jax.vjp(of_intervals, *(step.operands[place].center for place in places))
    count = next(len(coefficients) for coefficients in arrived if coefficients is not None)
    filled = [
        jnp.zeros((count, *result.lower.shape), result.lower.dtype) if coefficients is None else coefficients
        for result, coefficients in zip(step.results, arrived, strict=True)
    ]
    return [(step.operands[place], part) for place, part in zip(places, jax.vmap(pull)(filled), strict=True)]
