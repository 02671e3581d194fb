"""Interval bound propagation: what every logit and every margin can be while the input moves in a box."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.certificates.backward import Relax, at_intervals, least_margins
from jaxnets.certificates.tape import record
from jaxnets.types import Array, LogitsFn


def interval_bounds(logits_fn: LogitsFn, lower: Array, upper: Array, *, norm: float = jnp.inf) -> tuple[Array, Array]:
    """The least and the largest that each logit can be: ``lower <= f(x) <= upper`` for all ``x`` in a box.

    Layer by layer, each entry by itself: an affine layer gives ``W c + b -+ |W| r`` for the centres ``c`` and radii
    ``r`` of its input, a rising function its values at the ends. Exact for one affine layer; behind the first the
    bounds forget that entries move together, and the deeper the network the looser they are. They have derivatives with
    respect to the arrays in ``logits_fn``, so that a network can be trained to have narrow ones.

    Computed in the network's own precision, not rounded outwards: they may be wrong by as much as rounding takes from
    values as large as the bounds.

    Args:
      logits_fn: ``x[B, ...] -> logits[B, K]``, in inference mode, of the operations in `certificates.rules`.
      lower, upper: the box of every row, ``[B, ...]``.
      norm: infinity for all of the box; 2 or 1 for the ball in it alone, the points whose distances from its centre,
        each in units of half its side, have at most length one in that norm. The first layer's bounds are exact in
        norm 2, and those of norm 2 in norm 1; from there on boxes hold what is bounded.

    Returns:
      ``(lower[B, K], upper[B, K])``.

    Raises:
      NotImplementedError: for an operation without a rule; it is named.
      ValueError: for another norm, and where the boxes or the logits have a shape that does not fit.

    Gowal et al. 2018, https://arxiv.org/abs/1810.12715.

    >>> x = jnp.array([[0.0, 1.0]])
    >>> print(*interval_bounds(lambda x: jax.nn.relu(x - 2 * x[:, ::-1]), x, x + 0.5))
    [[0. 0.]] [[0.  1.5]]
    """
    check_box(lower, upper, norm)
    return _interval_bounds(as_pytree(logits_fn), lower, upper, norm)


def interval_margins(logits_fn: LogitsFn, lower: Array, upper: Array, y: Array, *, norm: float = jnp.inf) -> Array:
    """Lower bounds of the margins ``z_y - z_k`` in a box, ``[B, K]``, zero for ``k = y``; above zero: certified.

    The last affine layers are merged with the differences, which is tighter than the difference of `interval_bounds`.

    Args:
      logits_fn, lower, upper, norm: as for `interval_bounds`.
      y: classes ``[B]``.

    Raises:
      NotImplementedError, ValueError: as `interval_bounds` does, and where ``y`` is not one class a row.

    Gowal et al. 2018, https://arxiv.org/abs/1810.12715, section 3.

    >>> x = jnp.array([[0.0, 1.0]])
    >>> print(interval_margins(lambda x: x @ jnp.array([[1.0, 2.0], [1.0, 1.0]]), x, x + 0.5, jnp.array([1])))
    [[0. 0.]]
    """
    check_box(lower, upper, norm, y)
    return margins_in_boxes(as_pytree(logits_fn), lower, upper, y, norm, at_intervals)


def check_box(lower: Array, upper: Array, norm: float, y: Array | None = None) -> None:
    """Raises ValueError unless the ends are floats ``[B, ...]`` alike, the norm is known and ``y`` is ``[B]``."""
    if norm not in (1, 2, jnp.inf):
        raise ValueError(f"norm must be 1, 2 or infinity, got {norm}")
    if lower.shape != upper.shape or lower.ndim < 2 or not jnp.issubdtype(lower.dtype, jnp.floating):
        raise ValueError(
            "lower and upper must be floats of one shape [B, ...], a box for each row, got "
            f"{lower.dtype}{list(lower.shape)} and {upper.dtype}{list(upper.shape)}"
        )
    if y is not None and (y.shape != lower.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer)):
        raise ValueError(f"y must be one integer class for each of {len(lower)} rows, got {y.dtype}{list(y.shape)}")


@partial(jax.jit, static_argnames="norm")
def _interval_bounds(logits_fn, lower, upper, norm):
    def of_row(lower, upper):
        logits = record(logits_fn, lower, upper, norm).logits
        return logits.lower[0], logits.upper[0]

    return jax.vmap(of_row)(lower, upper)


@partial(jax.jit, static_argnames=("norm", "relax"))
def margins_in_boxes(logits_fn: LogitsFn, lower: Array, upper: Array, y: Array, norm: float, relax: Relax) -> Array:
    """`least_margins` of every row, ``[B, K]``."""

    def of_row(lower, upper, y):
        return least_margins(record(logits_fn, lower, upper, norm), y, relax)

    return jax.vmap(of_row)(lower, upper, y)
