"""Of one example: room to the box, scales that fit a ball, largest coordinates, directions of length one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.folds import largest, root, total
from jaxnets.threats.threat import Threat
from jaxnets.types import Array


def where_largest(values: Array, count: Any) -> Array:
    """Where the ``floor(count)`` largest of ``values >= 0`` are, the first of equals: bool, of their shape.

    The bits of such floats have the order of integers. A search bit by bit for the least value that is in costs far
    less than sorting, and unlike `jax.lax.top_k` takes a traced count.
    """
    flat = jax.lax.stop_gradient(values).ravel()
    bits = jax.lax.bitcast_convert_type(flat, jnp.dtype(f"uint{8 * flat.dtype.itemsize}"))
    count = jnp.floor(jnp.clip(jax.lax.stop_gradient(count), 0, flat.size)).astype(jnp.int32)
    width = 8 * flat.dtype.itemsize - 1

    def narrow(number, least):
        higher = least | (jnp.ones((), bits.dtype) << jnp.asarray(width - 1 - number, bits.dtype))
        return jnp.where(jnp.sum(bits >= higher, dtype=jnp.int32) >= count, higher, least)

    least = jax.lax.fori_loop(0, width, narrow, jnp.zeros((), bits.dtype))
    above, level = bits > least, bits == least
    room = count - jnp.sum(above, dtype=jnp.int32)
    return (above | (level & (jnp.cumsum(level, dtype=jnp.int32) <= room))).reshape(values.shape)


def room_to_box(z: Array, x: Array, threat: Threat) -> Array:
    """How far each coordinate may go from ``x`` towards ``z`` before it meets the box."""
    return jnp.maximum(jnp.where(z > x, threat.upper - x, x - threat.lower), 0)


def bisect(fits: Callable[[Array], Array], upper: Array) -> Array:
    """The largest value in ``[0, upper]`` for which ``fits`` holds, to 2^-30 of ``upper``; ``fits`` is falling.

    In as many rounds for every row: a loop until all rows are done would make the devices that hold them wait for each
    other in every step of an attack.
    """

    def halve(_, bracket):
        middle = (bracket[0] + bracket[1]) / 2
        good = fits(middle)
        return jnp.where(good, middle, bracket[0]), jnp.where(good, bracket[1], middle)

    bracket = (jnp.zeros_like(upper), upper)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, 30, halve, bracket)[0])


def finish(delta: Array, z: Array, x: Array, threat: Threat, power: int) -> Array:
    """``x + delta`` without the rounding error of ``delta``; ``z`` cut to the box where that lies in the ball.

    ``power`` is that of the norm: sizes to this power add up.
    """
    meets_box = jnp.abs(delta) >= room_to_box(z, x, threat)
    on_box, off_box = threat.size(jnp.where(meets_box, delta, 0)), threat.size(jnp.where(meets_box, 0, delta))
    left = jnp.maximum(threat.epsilon**power - on_box**power, 0) ** (1 / power)
    shrink = jax.lax.stop_gradient(jnp.where(off_box > left, left / jnp.where(off_box > 0, off_box, 1), 1))
    boxed = jnp.clip(z, threat.lower, threat.upper)
    moved = jnp.clip(x + delta * shrink, threat.lower, threat.upper)
    if power == 1:
        moved = _towards(x, moved, jnp.abs(delta * shrink))
    # Exactly on the box, not a rounding error inside it: what `inward` does next hangs on it.
    cut = jnp.where(meets_box, boxed, moved)
    return jnp.where(threat.size(boxed - x) <= threat.epsilon, boxed, cut)


def _towards(x: Array, moved: Array, length: Array) -> Array:
    """``moved``, one number nearer to ``x`` where rounding took it further than ``length``.

    In L1 the rounding errors of thousands of coordinates add up.
    """
    value, x, length = map(jax.lax.stop_gradient, (moved, x, length))
    return moved + jnp.where(jnp.abs(value - x) > length, jnp.nextafter(value, x) - value, 0)


def inward(gradient: Array, x: Array, threat: Threat) -> Array:
    """The gradient without the coordinates that lie on the box and would leave it."""
    leaves = ((x >= threat.upper) & (gradient > 0)) | ((x <= threat.lower) & (gradient < 0))
    return jnp.where(leaves, 0, gradient)


def unit_length(gradient: Array) -> Array:
    """``g / |g|`` at any scale of ``g``, zero where ``g`` is zero: scaled first, a tiny gradient does not underflow."""
    most = jax.lax.stop_gradient(largest(jnp.abs(gradient)))
    scaled = gradient / jnp.where(most > 0, most, 1)
    size = root(total(scaled**2))
    return scaled / jnp.where(size > 0, size, 1)
