"""CROWN-IBP: linear bounds of the margins through ReLU and max pooling, with bounds between the layers by intervals."""

import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.certificates.backward import at_intervals, weighted
from jaxnets.certificates.intervals import check_box, interval_margins, margins_in_boxes
from jaxnets.certificates.rules import Interval, center, lower, upper
from jaxnets.certificates.tape import Step
from jaxnets.types import Array, LogitsFn


def crown_margins(logits_fn: LogitsFn, lower: Array, upper: Array, y: Array, *, norm: float = jnp.inf) -> Array:
    """Lower bounds of the margins ``z_y - z_k`` in a box, ``[B, K]``, zero for ``k = y``; above zero: certified.

    Going back from the logits, ``max(a, b)`` with ``l <= a - b <= u`` lies between two planes where ``l < 0 < u``::

        b + [u > -l] (a - b)  <=  max(a, b)  <=  b + u / (u - l) (a - b - l)

    and is ``a`` or ``b`` elsewhere; ReLU is ``max(x, 0)``, and max pooling is made of such maxima. At any other
    operation that is not affine (tanh, a minimum, a reduction by a maximum, a product of two values) its interval
    stands for it, as it does in `interval_margins` at the first operation that is not affine. What is left in the end
    is a linear function of the input, whose least value in a box or a ball is known.

    Neither these bounds nor those of `interval_margins` are always the tighter ones: both hold. Time and memory are
    those of ``K`` backward passes.

    Args:
      logits_fn, lower, upper, y, norm: as for `interval_margins`.

    Raises:
      NotImplementedError, ValueError: as `interval_margins` does.

    Zhang et al. 2020, https://arxiv.org/abs/1906.06316; Zhang et al. 2018, https://arxiv.org/abs/1811.00866.

    >>> import jax
    >>> f = lambda x: jnp.concatenate([jax.nn.relu(x) - x / 2, 0 * x - 2], axis=1)
    >>> x = jnp.array([[0.0]])
    >>> print(crown_margins(f, x - 1, x + 3, jnp.array([0])))
    [[0.  1.5]]
    """
    check_box(lower, upper, norm, y)
    return margins_in_boxes(as_pytree(logits_fn), lower, upper, y, norm, _planes)


def tightest_margins(logits_fn: LogitsFn, lower: Array, upper: Array, y: Array, *, norm: float = jnp.inf) -> Array:
    """The greater of `interval_margins` and `crown_margins`, entry by entry, which bounds too; arguments as theirs."""
    arguments = (as_pytree(logits_fn), lower, upper, y)
    # Where one has overflowed the other may still hold.
    return jnp.fmax(interval_margins(*arguments, norm=norm), crown_margins(*arguments, norm=norm))


def _planes(step: Step, coefficients: Array) -> tuple[list[tuple[Interval, Array]], Array]:
    """A `Relax`: a maximum becomes the plane below it where its coefficient is positive, the one above elsewhere."""
    if step.maximum is None:
        return at_intervals(step, coefficients)
    (a, b), result = step.maximum, step.results[0]
    is_a, is_b = lower(a) >= upper(b), lower(b) >= upper(a)
    open_ = ~(is_a | is_b)
    # Where it is known which one is greater, ends may be infinite: nothing may be computed with them.
    least, most = (jnp.where(open_, end, 1) for end in (lower(a) - upper(b), upper(a) - lower(b)))
    lead, rest = (jnp.where(open_, gap, 0) for gap in (center(a) - center(b), center(b) - result.center))
    above = jnp.where(open_, most / jnp.where(open_, most - least, 1), is_a)
    below = jnp.where(open_, most > -least, is_a)
    positive, negative = jnp.maximum(coefficients, 0), jnp.minimum(coefficients, 0)
    bias = weighted(positive, below * lead + rest)
    bias += weighted(negative, jnp.where(open_, above * (lead - least) + rest, 0))
    of_a = positive * below + negative * above
    shares = [(a, of_a), (b, coefficients - of_a)]
    return [(operand, _unbroadcast(share, operand)) for operand, share in shares if isinstance(operand, Interval)], bias


def _unbroadcast(coefficients: Array, operand: Interval) -> Array:
    """Summed over the axes along which the operand is repeated."""
    shape = operand.lower.shape
    axes = [axis for axis, size in enumerate(shape, 1) if size != coefficients.shape[axis]]
    return jnp.sum(coefficients, axis=axes, keepdims=True) if axes else coefficients
