"""Threats: what an attacker may do to one example, a norm ball around it inside the box of valid data.

A threat works on one example of any shape; `each_row` lifts its verbs to a batch. ``epsilon`` is a pytree leaf in the
units of the data, so one compiled program serves every epsilon, and `jax.vmap` over a threat sweeps it; the box is
static.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.draws import drawn
from jaxnets.folds import largest, length, root, total
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


def check_one_a_row(x: Array, **values: Any) -> None:
    """Raises ValueError unless every one of ``values`` is a scalar or ``[B]``, and for an epsilon below 0.

    That of an array on a device is not looked at, which would wait for it.
    """
    if "epsilon" in values and not isinstance(values["epsilon"], jax.Array) and np.any(np.less(values["epsilon"], 0)):
        raise ValueError(f"epsilon must be 0 or more, got {values['epsilon']}")
    for name, value in values.items():
        if jnp.shape(value) not in ((), (len(x),)):
            raise ValueError(
                f"{name} must be a scalar or have one entry for each of the {len(x)} rows, got {jnp.shape(value)}"
            )


def a_row(value: Any, x: Array) -> Array:
    """One value a row, ``[B]``, of the type of ``x[B, ...]``."""
    return jnp.broadcast_to(jnp.asarray(value, x.dtype), len(x))


def each_row(verb: Callable[..., Array], threat: Threat, *arguments: Array) -> Array:
    """Applies ``verb(threat, ...)`` to every row of ``arguments[B, ...]``; ``epsilon`` is a scalar or ``[B]``.

    The results keep the type of the last argument, whatever that of ``epsilon``; half precision is computed in single,
    for squares and sums of it overflow.

    >>> import jax.numpy as jnp
    >>> x = jnp.zeros((2, 3))
    >>> each_row(Linf.project, Linf(jnp.array([0.1, 0.2])), x + 1, x)[:, 0]
    Array([0.1, 0.2], dtype=float32)
    """
    check_one_a_row(arguments[0], epsilon=threat.epsilon)
    dtype = arguments[-1].dtype
    arguments = tuple(map(_in_single, arguments))
    threat = replace(threat, epsilon=a_row(threat.epsilon, arguments[-1]))  # pyright: ignore
    return jax.vmap(verb)(threat, *arguments).astype(dtype)


def _in_single(array: Array) -> Array:
    """The array, in single precision where it is in less."""
    return array.astype(jnp.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else array


def sizes(threat: Threat, x_adv: Array, x: Array) -> Array:
    """The size of every row's perturbation, ``[B]``, for ``x_adv[B, ...]`` and ``x[B, ...]``."""
    return jax.vmap(threat.size)(x_adv - x)


def _pytree(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree whose one leaf is ``epsilon``; its other fields are static.

    Not by `jax.tree_util.register_dataclass`: with jax 0.10 the trees of two such classes are equal where their static
    fields are, and where their hashes collide too a jitted function runs the program of one norm for another.
    """
    make: Any = cls
    static = [one.name for one in fields(make) if one.name != "epsilon"]

    def flatten(threat: Any):
        return (threat.epsilon,), tuple(getattr(threat, name) for name in static)

    jax.tree_util.register_pytree_node(cls, flatten, lambda values, leaves: make(*leaves, *values))
    return cls


@_pytree
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
        return jnp.sign(_inward(gradient, x, self))

    def size(self, delta: Array) -> Array:
        return largest(jnp.abs(delta))


@_pytree
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
        offset, room = z - x, _room(z, x, self)
        distance = jnp.abs(offset)
        # In units of epsilon squares neither underflow nor overflow where that would matter.
        unit = jnp.where(self.epsilon > 0, self.epsilon, 1).astype(x.dtype)
        far, wide = distance / unit, room / unit
        near = _bisect(lambda s: total(jnp.minimum(s * far, wide) ** 2) <= (self.epsilon > 0), jnp.ones((), x.dtype))
        # With the coordinates that meet the box known, the scale of the others has a closed form.
        moving = near * distance < room
        left = self.epsilon**2 - total(jnp.where(moving, 0, room**2))
        rest = total(jnp.where(moving, distance**2, 0))
        scale = root(jnp.maximum(left, 0) / jnp.where(rest > 0, rest, 1))
        return _finish(jnp.clip(scale * offset, -room, room), z, x, self, power=2)

    def sample(self, key: Array, x: Array) -> Array:
        """``epsilon u^(1/n) g / |g|`` with ``g`` normal and ``u`` uniform: the radius to the power n is uniform."""
        direction_key, radius_key = jax.random.split(key)
        u = jax.random.uniform(radius_key, (), x.dtype)
        return x + self.epsilon * u ** (1 / x.size) * _unit(drawn(jax.random.normal, direction_key, x.shape, x.dtype))

    def direction(self, gradient: Array, x: Array) -> Array:
        return _unit(_inward(gradient, x, self))

    def size(self, delta: Array) -> Array:
        return length(delta)


@_pytree
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
        offset, room = z - x, _room(z, x, self)
        distance = jnp.abs(offset)
        # Searched from above: t = (1 - s) max |d|, so that the largest s is the least threshold.
        most = largest(distance)
        fits = lambda s: total(jnp.clip(distance - (most - s), 0, room)) <= self.epsilon  # noqa: E731
        near = most - _bisect(fits, most)
        # With the coordinates known that are zero or meet the box, the threshold of the others has a closed form.
        moving = (distance > near) & (distance - near < room)
        fixed = total(jnp.where((distance > near) & ~moving, room, 0))
        count = jnp.sum(moving, dtype=jnp.int32)
        exact = (total(jnp.where(moving, distance, 0)) + fixed - self.epsilon) / jnp.maximum(count, 1)
        threshold = jnp.where(count > 0, exact, near)
        return _finish(jnp.sign(offset) * jnp.clip(distance - threshold, 0, room), z, x, self, power=1)

    def sample(self, key: Array, x: Array) -> Array:
        """``epsilon l / (|l|_1 + e)`` with ``l`` Laplace and ``e`` exponential (Barthe et al. 2005)."""
        offset_key, slack_key = jax.random.split(key)
        offset = drawn(jax.random.laplace, offset_key, x.shape, x.dtype)
        slack = jax.random.exponential(slack_key, (), x.dtype)
        return x + self.epsilon * offset / (jnp.sum(jnp.abs(offset)) + slack)

    def direction(self, gradient: Array, x: Array) -> Array:
        gradient = _inward(gradient, x, self)
        steep = jnp.abs(gradient)
        # Not by `jax.lax.top_k`, for which every device would gather the rows of all.
        if self.top == 1:
            chosen = (jnp.arange(steep.size) == jnp.argmax(steep)).reshape(steep.shape)
        else:
            chosen = _largest(steep, self.top)
        step = jnp.where(chosen, jnp.sign(gradient), 0)
        return step / jnp.maximum(jnp.sum(jnp.abs(step)), 1)

    def size(self, delta: Array) -> Array:
        return total(jnp.abs(delta))


@_pytree
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
        return jnp.where(_largest(saved, self.epsilon), boxed, x)

    def sample(self, key: Array, x: Array) -> Array:
        """Epsilon coordinates drawn without replacement, each uniform in the box, which must be finite."""
        which_key, value_key = jax.random.split(key)
        chosen = _largest(drawn(jax.random.uniform, which_key, x.shape, x.dtype), self.epsilon)
        values = drawn(jax.random.uniform, value_key, x.shape, x.dtype, self.lower, self.upper)
        return jnp.where(chosen, values, x)

    def direction(self, gradient: Array, x: Array) -> Array:
        """The steepest of the steps that change one coordinate by one unit of the data."""
        return L1(self.epsilon, self.lower, self.upper).direction(gradient, x)

    def size(self, delta: Array) -> Array:
        return jnp.sum(delta != 0, dtype=jnp.promote_types(delta.dtype, jnp.float32))


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


jax.tree_util.register_pytree_node(
    Masked,
    lambda threat: ((threat.epsilon,), (threat.mask, threat.lower, threat.upper)),
    lambda values, leaves: Masked(values[0], *leaves, *values[1:]),
)


def _largest(values: Array, count: Any) -> Array:
    """Where the ``floor(count)`` largest of ``values >= 0`` are, the first of equals: bool, of their shape.

    The bits of such floats have the order of integers. A search bit by bit for the least value that is in costs far
    less than sorting, and unlike `jax.lax.top_k` takes a traced count.
    """
    flat = jax.lax.stop_gradient(values).ravel()
    bits = jax.lax.bitcast_convert_type(flat, jnp.dtype(f"uint{8 * flat.dtype.itemsize}"))
    count = jnp.floor(jnp.clip(jax.lax.stop_gradient(count), 0, flat.size)).astype(jnp.int32)
    width = 8 * flat.dtype.itemsize - 1

    def narrow(number, least):
        higher = least | (jnp.ones((), bits.dtype) << (width - 1 - number).astype(bits.dtype))
        return jnp.where(jnp.sum(bits >= higher, dtype=jnp.int32) >= count, higher, least)

    least = jax.lax.fori_loop(0, width, narrow, jnp.zeros((), bits.dtype))
    above, level = bits > least, bits == least
    room = count - jnp.sum(above, dtype=jnp.int32)
    return (above | (level & (jnp.cumsum(level, dtype=jnp.int32) <= room))).reshape(values.shape)


def _room(z: Array, x: Array, threat: Threat) -> Array:
    """How far each coordinate may go from ``x`` towards ``z`` before it meets the box."""
    return jnp.maximum(jnp.where(z > x, threat.upper - x, x - threat.lower), 0)


def _bisect(fits: Callable[[Array], Array], upper: Array) -> Array:
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


def _finish(delta: Array, z: Array, x: Array, threat: Threat, power: int) -> Array:
    """``x + delta`` without the rounding error of ``delta``; ``z`` cut to the box where that lies in the ball.

    ``power`` is that of the norm: sizes to this power add up.
    """
    meets_box = jnp.abs(delta) >= _room(z, x, threat)
    on_box, off_box = threat.size(jnp.where(meets_box, delta, 0)), threat.size(jnp.where(meets_box, 0, delta))
    left = jnp.maximum(threat.epsilon**power - on_box**power, 0) ** (1 / power)
    shrink = jax.lax.stop_gradient(jnp.where(off_box > left, left / jnp.where(off_box > 0, off_box, 1), 1))
    boxed = jnp.clip(z, threat.lower, threat.upper)
    moved = jnp.clip(x + delta * shrink, threat.lower, threat.upper)
    if power == 1:
        moved = _towards(x, moved, jnp.abs(delta * shrink))
    # Exactly on the box, not a rounding error inside it: what `_inward` does next hangs on it.
    cut = jnp.where(meets_box, boxed, moved)
    return jnp.where(threat.size(boxed - x) <= threat.epsilon, boxed, cut)


def _towards(x: Array, moved: Array, length: Array) -> Array:
    """``moved``, one number nearer to ``x`` where rounding took it further than ``length``.

    In L1 the rounding errors of thousands of coordinates add up.
    """
    value, x, length = map(jax.lax.stop_gradient, (moved, x, length))
    return moved + jnp.where(jnp.abs(value - x) > length, jnp.nextafter(value, x) - value, 0)


def _inward(gradient: Array, x: Array, threat: Threat) -> Array:
    """The gradient without the coordinates that lie on the box and would leave it."""
    leaves = ((x >= threat.upper) & (gradient > 0)) | ((x <= threat.lower) & (gradient < 0))
    return jnp.where(leaves, 0, gradient)


def _unit(gradient: Array) -> Array:
    """``g / |g|`` at any scale of ``g``, zero where ``g`` is zero: scaled first, a tiny gradient does not underflow."""
    most = jax.lax.stop_gradient(largest(jnp.abs(gradient)))
    scaled = gradient / jnp.where(most > 0, most, 1)
    size = root(total(scaled**2))
    return scaled / jnp.where(size > 0, size, 1)
