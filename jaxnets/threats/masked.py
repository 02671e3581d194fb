"""Threats to a part of an example."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnets.threats.balls import Linf
from jaxnets.threats.threat import pytree
from jaxnets.types import Array


class _Static:
    """An array of bools that compares and hashes by its contents, so that it can stand in a program's key."""

    def __init__(self, values: Any):
        self.values = np.array(values, bool)
        self.values.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.values.shape, self.values.tobytes()))

    def __repr__(self) -> str:
        return f"<{self.values.sum()} of shape {list(self.values.shape)}>"


@pytree
@dataclass(frozen=True)
class Masked:
    """A sticker: what lies under a mask may change by at most epsilon a coordinate, and nothing else may.

    ``max_i |delta_i| <= epsilon`` where the mask is true, ``delta_i = 0`` elsewhere. With the default epsilon what lies
    under the mask may become anything in the box [0, 1]. The mask is static as the box is: another means a new trace.

    Args:
      mask: bools that broadcast to the shape of one example; attacks raise ValueError for others.
      epsilon: largest change under the mask, in the units of the data; a leaf.

    Eykholt et al. 2018, https://arxiv.org/abs/1707.08945.

    >>> print(Masked(jnp.array([True, False])).project(jnp.array([0.7, 0.7]), jnp.zeros(2)))
    [0.7 0. ]
    """

    mask: Any
    epsilon: Any = 1.0
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "mask", self.mask if isinstance(self.mask, _Static) else _Static(self.mask))

    def project(self, z: Array, x: Array) -> Array:
        return jnp.where(self._over(x), self._everywhere().project(z, x), x)

    def sample(self, key: Array, x: Array) -> Array:
        return jnp.where(self._over(x), self._everywhere().sample(key, x), x)

    def direction(self, gradient: Array, x: Array) -> Array:
        return jnp.where(self._over(x), self._everywhere().direction(gradient, x), 0)

    def size(self, delta: Array) -> Array:
        """The largest change under the mask; infinite where anything else has changed."""
        return jnp.max(jnp.where(self._over(delta) | (delta == 0), jnp.abs(delta), jnp.inf))

    def _over(self, x: Array) -> np.ndarray:
        try:
            return np.broadcast_to(self.mask.values, x.shape)
        except ValueError as error:
            raise ValueError(
                f"a mask must broadcast to the shape of one example, {list(x.shape)}, got a mask of shape "
                f"{list(self.mask.values.shape)}: for the pixels of an image it is mask[..., None]"
            ) from error

    def _everywhere(self) -> Linf:
        return Linf(self.epsilon, self.lower, self.upper)
