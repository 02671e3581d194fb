"""What a threat is to an attack, and how one becomes a pytree."""

from dataclasses import fields
from typing import Any, Protocol, TypeVar

import jax

from jaxnets.types import Array

T = TypeVar("T")


class Threat(Protocol):
    """The verbs that an attack uses. ``x``, ``z``, ``gradient`` and ``delta`` have the shape of one example.

    Attributes:
      epsilon: radius of the ball, in the units of the data; a leaf.
      lower, upper: the box of valid data; static.
    """

    @property
    def epsilon(self) -> Any: ...

    @property
    def lower(self) -> float: ...

    @property
    def upper(self) -> float: ...

    def project(self, z: Array, x: Array) -> Array:
        """The point nearest to ``z`` (Euclidean) in both the ball around ``x`` and the box. ``x`` lies in the box."""
        ...

    def sample(self, key: Array, x: Array) -> Array:
        """A point uniform in the ball around ``x``; it may leave the box."""
        ...

    def direction(self, gradient: Array, x: Array) -> Array:
        """The direction of size one of largest ``<gradient, direction>`` that does not push ``x`` out of the box."""
        ...

    def size(self, delta: Array) -> Array:
        """The norm of ``delta``, a scalar."""
        ...


def pytree(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree whose one leaf is ``epsilon``; its other fields are static.

    Not by `jax.tree_util.register_dataclass`: with jax 0.10 the trees of two such classes are equal where their static
    fields are, and where their hashes collide too a jitted function runs the program of one norm for another.
    """
    make: Any = cls
    static = [one.name for one in fields(make) if one.name != "epsilon"]

    def flatten(threat: Any):
        return (threat.epsilon,), tuple(getattr(threat, name) for name in static)

    def build(values: Any, leaves: Any):
        return make(epsilon=leaves[0], **dict(zip(static, values, strict=True)))

    jax.tree_util.register_pytree_node(cls, flatten, build)
    return cls
