"""Which rows are certified: no point that a threat allows changes their class."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.certificates.crown import tightest_margins
from jaxnets.threats import Linf, Masked, Threat, each_row
from jaxnets.types import Array, LogitsFn

Margins = Callable[[LogitsFn, Array, Array, Array], Array]
"""``(logits_fn, lower[B, ...], upper[B, ...], y[B]) -> [B, K]``: lower bounds of ``z_y - z_k`` in each row's box."""


class Certificate(Protocol):
    """``(logits_fn, x[B, ...], y[B]) -> bool[B]``: the rows whose class is ``y`` all over the threat that it knows."""

    def __call__(self, logits_fn: LogitsFn, x: Array, y: Array, /) -> Array: ...


def box(threat: Threat, x: Array) -> tuple[Array, Array]:
    """The least and the largest that each entry of ``x[B, ...]`` becomes in a threat that is a box: two ``[B, ...]``.

    Raises:
      ValueError: for a threat that is none.

    >>> import jaxnets as jn
    >>> print(*box(jn.Linf(0.25), jnp.array([[0.5, 1.0]])))
    [[0.25 0.75]] [[0.75 1.  ]]
    """
    if not isinstance(threat, Linf | Masked):
        raise ValueError(
            f"bounds of intervals hold in a box, the threat Linf or Masked, got {threat}: certify L2 by smoothing"
        )
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

    ``min_{k != y} margins_k > slack max_k |z_k(x)|``. Products of matrices are computed in full precision, also on
    devices whose default is less.

    Args:
      logits_fn: ``x[B, ...] -> logits[B, K]``, in inference mode, in single precision or better.
      x: rows ``[B, ...]`` inside the threat's box.
      y: classes ``[B]``.
      threat: a box, `Linf` or `Masked`.
      margins: `interval_margins`, `crown_margins`, or the tighter of the two in each entry.
      slack: what rounding may take, as a share of the row's largest logit.

    Raises:
      NotImplementedError: for an operation of the network without a rule.
      ValueError: for another threat, and shapes that do not fit.

    >>> import jaxnets as jn
    >>> x = jnp.array([[0.5, 0.2], [0.5, 0.45]])
    >>> print(certified(lambda x: x, x, jnp.array([0, 0]), threat=jn.Linf(0.1)))
    [ True False]
    """
    logits_fn, x = as_pytree(logits_fn), jnp.asarray(x)
    with jax.default_matmul_precision("highest"):
        least, largest = margins(logits_fn, *box(threat, x), y), _largest_logits(logits_fn, x)
    others = jnp.arange(least.shape[1]) != y[:, None]
    return jnp.all((least > slack * largest[:, None]) | ~others, axis=1)


@jax.jit
def _largest_logits(logits_fn, x) -> Array:
    return jnp.max(jnp.abs(logits_fn(x)), axis=1)
