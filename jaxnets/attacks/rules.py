"""Step rules: what an iterated attack does with a gradient. Each is written for one example.

A rule is a pytree of `jax.tree_util.Partial`s: a number in it is a leaf, so another one means no new trace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


def here(state: Any, length: Array, x_t: Array) -> Array:
    """The gradient is taken at the iterate."""
    return x_t


def _nothing(x: Array) -> tuple[()]:
    return ()


def _steepest(state: Any, threat: Threat, length: Array, gradient: Array, x_t: Array) -> tuple[Array, Any]:
    return x_t + length * threat.direction(gradient, x_t), state
