"""The balls of the norms."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.draws import drawn
from jaxnets.folds import largest, length, root, total
from jaxnets.threats.geometry import bisect, finish, inward, room_to_box, unit_length, where_largest
from jaxnets.threats.threat import pytree
from jaxnets.types import Array


@pytree
@dataclass(frozen=True)
class Linf:
    """Every coordinate may move by at most epsilon: ``max_i |delta_i| <= epsilon``.

    >>> print(Linf(0.1).project(jnp.array([0.5, 0.05]), jnp.array([0.2, 0.0])))
    [0.3  0.05]
    """

    epsilon: Any
    lower: float = 0.0
    upper: float = 1.0

    def project(self, z: Array, x: Array) -> Array:
        return jnp.clip(z, jnp.maximum(x - self.epsilon, self.lower), jnp.minimum(x + self.epsilon, self.upper))

    def sample(self, key: Array, x: Array) -> Array:
        return x + self.epsilon * drawn(jax.random.uniform, key, x.shape, x.dtype, -1.0, 1.0)

    def direction(self, gradient: Array, x: Array) -> Array:
        return jnp.sign(inward(gradient, x, self))

    def size(self, delta: Array) -> Array:
        return largest(jnp.abs(delta))


@pytree
@dataclass(frozen=True)
class L2:
    """The Euclidean length of the perturbation is at most epsilon: ``sqrt(sum_i delta_i^2) <= epsilon``.

    >>> print(L2(1.0, lower=-9, upper=9).project(jnp.array([3.0, 4.0]), jnp.zeros(2)))
    [0.6 0.8]
    """

    epsilon: Any
    lower: float = 0.0
    upper: float = 1.0

    def project(self, z: Array, x: Array) -> Array:
        """``x + clip(s (z - x))`` to the box, with the largest ``s <= 1`` that stays in the ball."""
        offset, room = z - x, room_to_box(z, x, self)
        distance = jnp.abs(offset)
        # In units of epsilon squares neither underflow nor overflow where that would matter.
        unit = jnp.where(self.epsilon > 0, self.epsilon, 1).astype(x.dtype)
        far, wide = distance / unit, room / unit
        near = bisect(lambda s: total(jnp.minimum(s * far, wide) ** 2) <= (self.epsilon > 0), jnp.ones((), x.dtype))
        # With the coordinates that meet the box known, the scale of the others has a closed form.
        moving = near * distance < room
        left = self.epsilon**2 - total(jnp.where(moving, 0, room**2))
        rest = total(jnp.where(moving, distance**2, 0))
        scale = root(jnp.maximum(left, 0) / jnp.where(rest > 0, rest, 1))
        return finish(jnp.clip(scale * offset, -room, room), z, x, self, power=2)

    def sample(self, key: Array, x: Array) -> Array:
        """``epsilon u^(1/n) g / |g|`` with ``g`` normal and ``u`` uniform: the radius to the power n is uniform."""
        direction_key, radius_key = jax.random.split(key)
        u = jax.random.uniform(radius_key, (), x.dtype)
        normal = drawn(jax.random.normal, direction_key, x.shape, x.dtype)
        return x + self.epsilon * u ** (1 / x.size) * unit_length(normal)

    def direction(self, gradient: Array, x: Array) -> Array:
        return unit_length(inward(gradient, x, self))

    def size(self, delta: Array) -> Array:
        return length(delta)


@pytree
@dataclass(frozen=True)
class L1:
    """The absolute changes sum to at most epsilon: ``sum_i |delta_i| <= epsilon``.

    The steepest step changes one coordinate; ``top`` coordinates with the largest gradients share it where an attack of
    few steps needs to change many.

    >>> print(L1(1.0, lower=-9, upper=9).project(jnp.array([1.5, 1.0]), jnp.zeros(2)))
    [0.75 0.25]
    """

    epsilon: Any
    lower: float = 0.0
    upper: float = 1.0
    top: int = 1

    def project(self, z: Array, x: Array) -> Array:
        """``x + sign(d) max(|d| - t, 0)``, cut to the box, for ``d = z - x`` and the least ``t >= 0`` that fits."""
        offset, room = z - x, room_to_box(z, x, self)
        distance = jnp.abs(offset)
        # Searched from above: t = (1 - s) max |d|, so that the largest s is the least threshold.
        most = largest(distance)
        fits = lambda s: total(jnp.clip(distance - (most - s), 0, room)) <= self.epsilon  # noqa: E731
        near = most - bisect(fits, most)
        # With the coordinates known that are zero or meet the box, the threshold of the others has a closed form.
        moving = (distance > near) & (distance - near < room)
        fixed = total(jnp.where((distance > near) & ~moving, room, 0))
        count = jnp.sum(moving, dtype=jnp.int32)
        exact = (total(jnp.where(moving, distance, 0)) + fixed - self.epsilon) / jnp.maximum(count, 1)
        threshold = jnp.where(count > 0, exact, near)
        return finish(jnp.sign(offset) * jnp.clip(distance - threshold, 0, room), z, x, self, power=1)

    def sample(self, key: Array, x: Array) -> Array:
        """``epsilon l / (|l|_1 + e)`` with ``l`` Laplace and ``e`` exponential (Barthe et al. 2005)."""
        offset_key, slack_key = jax.random.split(key)
        offset = drawn(jax.random.laplace, offset_key, x.shape, x.dtype)
        slack = jax.random.exponential(slack_key, (), x.dtype)
        return x + self.epsilon * offset / (jnp.sum(jnp.abs(offset)) + slack)

    def direction(self, gradient: Array, x: Array) -> Array:
        gradient = inward(gradient, x, self)
        steep = jnp.abs(gradient)
        # Not by `jax.lax.top_k`, for which every device would gather the rows of all.
        if self.top == 1:
            chosen = (jnp.arange(steep.size) == jnp.argmax(steep)).reshape(steep.shape)
        else:
            chosen = where_largest(steep, self.top)
        step = jnp.where(chosen, jnp.sign(gradient), 0)
        return step / jnp.maximum(jnp.sum(jnp.abs(step)), 1)

    def size(self, delta: Array) -> Array:
        return total(jnp.abs(delta))


@pytree
@dataclass(frozen=True)
class L0:
    """At most epsilon coordinates may change, each to anything in the box: ``#{i : delta_i != 0} <= epsilon``.

    Epsilon is a number of coordinates, an int or a float that is rounded down; every channel of a pixel counts.

    >>> print(L0(1).project(jnp.array([0.3, 3.0, 0.1]), jnp.array([0.9, 0.8, 0.1])))
    [0.9 1.  0.1]
    """

    epsilon: Any
    lower: float = 0.0
    upper: float = 1.0

    def project(self, z: Array, x: Array) -> Array:
        """``z`` cut to the box in the coordinates whose return to ``x`` would cost most, ``x`` in all others.

        Cut to ``c``, a coordinate saves ``(z - x)^2 - (z - c)^2``; of equals the first ones are kept.
        """
        boxed = jnp.clip(z, self.lower, self.upper)
        # The root of what is saved, as a product: squares of differences would underflow, overflow and cancel.
        saved = jnp.sqrt(jnp.abs(boxed - x)) * jnp.sqrt(jnp.abs(z - x) + jnp.abs(z - boxed))
        return jnp.where(where_largest(saved, self.epsilon), boxed, x)

    def sample(self, key: Array, x: Array) -> Array:
        """Epsilon coordinates drawn without replacement, each uniform in the box, which must be finite."""
        which_key, value_key = jax.random.split(key)
        chosen = where_largest(drawn(jax.random.uniform, which_key, x.shape, x.dtype), self.epsilon)
        values = drawn(jax.random.uniform, value_key, x.shape, x.dtype, self.lower, self.upper)
        return jnp.where(chosen, values, x)

    def direction(self, gradient: Array, x: Array) -> Array:
        """The steepest of the steps that change one coordinate by one unit of the data."""
        return L1(self.epsilon, self.lower, self.upper).direction(gradient, x)

    def size(self, delta: Array) -> Array:
        return jnp.sum(delta != 0, dtype=jnp.promote_types(delta.dtype, jnp.float32))
