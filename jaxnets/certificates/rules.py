"""What each operation of a network does to intervals: a rule for each of JAX's primitives that layers are made of.

A rule is ``(bind, *operands) -> Interval`` (or a list of them): ``bind`` is the operation on arrays, and an operand is
an `Interval` or, where it does not depend on the network's input, an array. Results hold every value that the operation
has for values in the operands' intervals.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnets.folds import root
from jaxnets.types import Array


@dataclass(frozen=True, eq=False)
class Interval:
    """Values between two, entry by entry. Two are the same value of the network where they are the same object.

    Attributes:
      lower, upper: floats of one shape; or bools: whether it is certain, and whether it is possible.
      greater: of a comparison the two operands ``(a, b)`` for which it says that ``a`` is the greater one (or equal).
      norm: infinity for all values between the two; 2 or 1 for those alone whose deviations from the centre, each in
        units of its radius, have at most length one in that norm.
    """

    lower: Array
    upper: Array
    greater: tuple[Any, Any] | None = None
    norm: float = np.inf

    @property
    def center(self) -> Array:
        return self.lower / 2 + self.upper / 2  # their sum may be infinite

    @property
    def radius(self) -> Array:
        return self.upper / 2 - self.lower / 2


Operand = Any
"""An `Interval` or an array."""
Rule = Callable[..., Interval | list[Interval]]


def lower(value: Operand) -> Array:
    return value.lower if isinstance(value, Interval) else value


def upper(value: Operand) -> Array:
    return value.upper if isinstance(value, Interval) else value


def center(value: Operand) -> Array:
    return value.center if isinstance(value, Interval) else value


def rising(bind: Callable, *operands: Operand) -> Interval:
    """No operand makes the result smaller where it is larger: exact."""
    return Interval(bind(*map(lower, operands)), bind(*map(upper, operands)))


def falling(bind: Callable, operand: Operand) -> Interval:
    return Interval(bind(operand.upper), bind(operand.lower))


def difference(bind: Callable, a: Operand, b: Operand) -> Interval:
    """Rising in the first, falling in the second."""
    return Interval(bind(lower(a), upper(b)), bind(upper(a), lower(b)))


def greater(bind: Callable, a: Operand, b: Operand) -> Interval:
    """With what is no number every comparison is false: where an end is none, nothing is certain."""
    unknown = functools.reduce(jnp.logical_or, (end != end for one in (a, b) for end in (lower(one), upper(one))))
    return Interval(bind(lower(a), upper(b)) & ~unknown, bind(upper(a), lower(b)) | unknown, (a, b))


def less(bind: Callable, a: Operand, b: Operand) -> Interval:
    return greater(lambda b, a: bind(a, b), b, a)


def unequal(bind: Callable, a: Operand, b: Operand) -> Any:
    """``x != x``, by which functions ask for NaN: never, and known to be so while a program is traced."""
    if a is b:
        return np.zeros(a.lower.shape, bool)
    certain = (upper(a) < lower(b)) | (upper(b) < lower(a))
    return Interval(certain, jnp.ones_like(certain))


def either(bind: Callable, a: Operand, b: Operand) -> Operand:
    """Of bools. What is never true leaves the other as it is, with the operands of its comparison."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, np.ndarray) and not one.any():
            return other
    return rising(bind, a, b)


def convert(bind: Callable, operand: Interval) -> Interval:
    """A float as a bool is whether it is not zero; every other conversion is rising."""
    floats = jnp.issubdtype(operand.lower.dtype, jnp.floating)
    if floats and bind.keywords["new_dtype"] == jnp.bool_:  # pyright: ignore
        return Interval((operand.lower > 0) | (operand.upper < 0), (operand.lower != 0) | (operand.upper != 0))
    return rising(bind, operand)


def product(bind: Callable, a: Operand, b: Operand) -> Interval:
    """Linear in each: ``|a b - a' b'| <= |a'| r_b + r_a (|b'| + r_b)`` around the centres; exact for one interval.

    In norm 2 the root of ``a'^2 r_b^2`` (Cauchy and Schwarz) is exact for one interval, and it holds in norm 1 as well.
    """
    middle = bind(center(a), center(b))
    if isinstance(a, Interval) and isinstance(b, Interval):
        radius = bind(jnp.abs(a.center), b.radius) + bind(a.radius, jnp.abs(b.center) + b.radius)
    else:
        norm = a.norm if isinstance(a, Interval) else b.norm
        sizes = [one.radius if isinstance(one, Interval) else jnp.abs(one) for one in (a, b)]
        radius = bind(*sizes) if norm == np.inf else root(bind(*map(jnp.square, sizes)))
    return Interval(middle - radius, middle + radius)


def times(bind: Callable, a: Operand, b: Operand) -> Interval:
    """Entry by entry: the extremes are among the products of the ends."""
    if a is b:
        return square(lambda x: bind(x, x), a)
    if not (isinstance(a, Interval) and isinstance(b, Interval)):
        return product(bind, a, b)
    return _hull([bind(one, other) for one in (a.lower, a.upper) for other in (b.lower, b.upper)])


def quotient(bind: Callable, a: Operand, b: Operand) -> Interval:
    """Infinite where the divisor may be zero."""
    if not isinstance(b, Interval):
        radius, middle = bind(a.radius, jnp.abs(b)), bind(a.center, b)
        return Interval(middle - radius, middle + radius)
    away = (b.lower > 0) | (b.upper < 0)
    # The branch that is not chosen must have finite derivatives too.
    divisors = [jnp.where(away, end, 1) for end in (b.lower, b.upper)]
    hull = _hull([bind(end, divisor) for end in (lower(a), upper(a)) for divisor in divisors])
    return Interval(jnp.where(away, hull.lower, -jnp.inf), jnp.where(away, hull.upper, jnp.inf))


def square(bind: Callable, operand: Interval) -> Interval:
    """Even, and rising in the absolute value."""
    least = jnp.maximum(jnp.maximum(operand.lower, -operand.upper), 0)
    return Interval(bind(least), bind(jnp.maximum(operand.upper, -operand.lower)))


def integer_power(bind: Callable, operand: Interval) -> Interval:
    """Negative exponents through `quotient`, even ones through `square`; odd ones are rising."""
    exponent = bind.keywords["y"]  # pyright: ignore
    if exponent < 0:
        positive = integer_power(functools.partial(bind, y=-exponent), operand)
        return quotient(jnp.divide, jnp.ones_like(operand.lower), positive)
    return rising(bind, operand) if exponent % 2 else square(bind, operand)


def power(bind: Callable, base: Operand, exponent: Operand) -> Interval:
    """Monotone where the base is zero or more, by the exponent's sign; NaN elsewhere."""
    if isinstance(exponent, Interval):
        raise NotImplementedError(
            "there is no interval rule for a power whose exponent depends on the network's input: write it as exp and "
            "log"
        )
    ends = [bind(jnp.where(base.lower >= 0, end, jnp.nan), exponent) for end in (base.lower, base.upper)]
    return _hull(ends)


def select(bind: Callable, which: Operand, *cases: Operand) -> Interval:
    """Where both cases are possible, from the lesser lower end to the greater upper one.

    A case that is one of the operands that a comparison chose by is known to be the greater or the lesser of the two.
    """
    if not isinstance(which, Interval):
        return rising(bind, which, *cases)
    no, yes = cases
    if which.greater is not None:
        a, b = which.greater
        no, yes = _at_most(no, a, b), _at_least(yes, a, b)
        no, yes = _at_least(no, b, a), _at_most(yes, b, a)

    def chosen(end, hull):
        return jnp.where(which.lower, end(yes), jnp.where(which.upper, hull(end(no), end(yes)), end(no)))

    return Interval(chosen(lower, jnp.minimum), chosen(upper, jnp.maximum))


def split(bind: Callable, operand: Interval) -> list[Interval]:
    return [Interval(*ends) for ends in zip(bind(operand.lower), bind(operand.upper), strict=True)]


def _at_least(case: Operand, one: Operand, other: Operand) -> Operand:
    """The case where it is ``one``, which is known to be ``other`` or more."""
    return Interval(jnp.maximum(lower(one), lower(other)), upper(one)) if case is one else case


def _at_most(case: Operand, one: Operand, other: Operand) -> Operand:
    return Interval(lower(one), jnp.minimum(upper(one), upper(other))) if case is one else case


def _hull(values: list[Array]) -> Interval:
    least, most = values[0], values[0]
    for value in values[1:]:
        least, most = jnp.minimum(least, value), jnp.maximum(most, value)
    return Interval(least, most)


AFFINE: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "add", "broadcast_in_dim", "concatenate", "copy", "cumsum", "dynamic_slice", "dynamic_update_slice",
            "gather", "name", "pad", "reduce_sum", "reduce_window_sum", "reshape", "rev", "slice", "squeeze", "stack",
            "tile", "transpose",
        ),
        rising,
    ),
    "convert_element_type": convert,
    "neg": falling,
    "split": split,
    "sub": difference,
}  # fmt: skip
"""Of all operands that are intervals together."""

BILINEAR: dict[str, Rule] = {
    "conv_general_dilated": product,
    "div": quotient,
    "dot_general": product,
    "mul": times,
}
"""Affine where only one operand is an interval, for ``div`` the first."""

ENTRYWISE = {
    "add", "convert_element_type", "copy", "div", "mul", "name", "neg", "pad", "reshape", "rev", "slice", "squeeze",
    "sub", "transpose",
}  # fmt: skip
"""Affine, and they move and scale single entries or leave some out: deviations keep the norm that bounds them, unless
the operand is broadcast."""

OTHERS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "and", "asinh", "atan", "cbrt", "ceil", "clamp", "cummax", "cummin", "erf", "exp", "exp2", "expm1", "floor",
            "log", "log1p", "logistic", "max", "min", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
            "reduce_precision", "reduce_window_max", "reduce_window_min", "round", "sign", "sinh", "sqrt",
            "stop_gradient", "tanh",
        ),
        rising,
    ),
    **dict.fromkeys(("erfc", "not", "rsqrt"), falling),
    **dict.fromkeys(("abs", "cosh", "square"), square),
    **dict.fromkeys(("ge", "gt"), greater),
    **dict.fromkeys(("le", "lt"), less),
    "integer_pow": integer_power,
    "ne": unequal,
    "or": either,
    "pow": power,
    "select_n": select,
}  # fmt: skip
