"""Which rows are certified: no point that a threat allows changes their class."""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.certificates.crown import tightest_margins
from jaxnets.certificates.tape import check_precision, record
from jaxnets.threats import L1, L2, Linf, Masked, Threat, each_row
from jaxnets.types import Array, LogitsFn

_NORMS: dict[type, float] = {Linf: jnp.inf, Masked: jnp.inf, L2: 2, L1: 1}
"""Of the threats that have bounds."""


class Margins(Protocol):
    """``(logits_fn, lower[B, ...], upper[B, ...], y[B], norm=norm) -> [B, K]``: lower bounds of ``z_y - z_k``.

    In each row's box, or in the ball in it, as `interval_margins` has it.
    """

    def __call__(self, logits_fn: LogitsFn, lower: Array, upper: Array, y: Array, /, *, norm: float) -> Array: ...


class Certificate(Protocol):
    """``(logits_fn, x[B, ...], y[B]) -> bool[B]``: the rows whose class is ``y`` all over the threat that it knows."""

    def __call__(self, logits_fn: LogitsFn, x: Array, y: Array, /) -> Array: ...


def margins_within(margins: Margins, logits_fn: LogitsFn, threat: Threat, x: Array, y: Array) -> Array:
    """Lower bounds of ``z_y - z_k`` wherever a threat takes ``x[B, ...]``, ``[B, K]``.

    Raises:
      ValueError: for a threat without bounds.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.5, 0.2]]), jnp.array([0])
    >>> print(margins_within(tightest_margins, lambda x: x, jn.L2(0.1, -9, 9), x, y) > 0.15)
    [[False  True]]
    """
    lower, upper = box(threat, x)
    return margins(logits_fn, lower, upper, y, norm=_NORMS[type(threat)])


def box(threat: Threat, x: Array) -> tuple[Array, Array]:
    """The least and the largest that each entry of ``x[B, ...]`` becomes in a threat: two ``[B, ...]``.

    In `L2` and `L1` as if the data had no box of its own: so the ball's centre is ``x``.

    Raises:
      ValueError: for a threat without bounds.

    >>> import jaxnets as jn
    >>> print(*box(jn.Linf(0.25), jnp.array([[0.5, 1.0]])))
    [[0.25 0.75]] [[0.75 1.  ]]
    """
    if type(threat) not in _NORMS:
        raise ValueError(f"there are bounds in {', '.join(one.__name__ for one in _NORMS)}, got {threat}")
    if _NORMS[type(threat)] < jnp.inf:
        threat = Linf(threat.epsilon, -jnp.inf, jnp.inf)
    lower, upper = (each_row(type(threat).project, threat, jnp.full_like(x, end), x) for end in (-jnp.inf, jnp.inf))
    return lower, upper


def certified(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat: Threat,
    margins: Margins = tightest_margins,
    slack: float = 1e-5,
) -> Array:
    """Whether each row is of its class, and stays so everywhere in the threat: bool ``[B]``. False says nothing.

    ``min_{k != y} margins_k > slack max_k |z_k|``, with the largest logit that `interval_bounds` allow in the threat:
    where bounds are wide, so is the rounding of what they are made of. Products of matrices are computed in full
    precision, also on devices whose default is less.

    Args:
      logits_fn: ``x[B, ...] -> logits[B, K]``, in inference mode, in single precision or better.
      x: rows ``[B, ...]`` inside the threat's box.
      y: classes ``[B]``; no row is of one that the network does not have.
      threat: `Linf`, `Masked`, `L2` or `L1`.
      margins: `interval_margins`, `crown_margins`, or the tighter of the two in each entry.
      slack: what rounding may take, as a share of the row's largest logit.

    Raises:
      NotImplementedError: for an operation of the network without a rule.
      ValueError: for another threat, shapes that do not fit, and a network that computes in less than single precision.

    >>> import jaxnets as jn
    >>> x = jnp.array([[0.5, 0.2], [0.5, 0.45]])
    >>> print(certified(lambda x: x, x, jnp.array([0, 0]), threat=jn.Linf(0.1)))
    [ True False]
    """
    # In less than single precision a row plus epsilon may be the row.
    logits_fn, x = as_pytree(logits_fn), jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    with jax.default_matmul_precision("highest"):
        ends, norm = box(threat, x), _NORMS[type(threat)]
        least, largest = margins(logits_fn, *ends, y, norm=norm), _largest_logits(logits_fn, *ends, norm=norm)
    mine = jnp.arange(least.shape[1]) == y[:, None]
    above = (least > slack * largest[:, None]) & jnp.isfinite(least)
    return jnp.all(above | mine, axis=1) & jnp.any(mine, axis=1)


@partial(jax.jit, static_argnames="norm")
def _largest_logits(logits_fn, lower, upper, *, norm) -> Array:
    """The largest absolute value that a logit has in the bounds, ``[B]``."""

    def of_row(lower, upper):
        tape = record(logits_fn, lower, upper, norm)
        check_precision(tape)
        return jnp.maximum(jnp.max(-tape.logits.lower), jnp.max(tape.logits.upper))

    return jax.vmap(of_row)(lower, upper)
