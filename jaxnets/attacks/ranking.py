"""Which of two perturbed points of a row is the better attack: first whether it succeeds, then by its loss.

By loss alone a row that is still right can beat one that is already wrong.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxnets.losses import succeeded
from jaxnets.types import Array, Loss


class Candidate(NamedTuple):
    """Points ``x[B, ...]``, whether each succeeds ``[B]``, and its loss ``[B]``."""

    x: Array
    success: Array
    loss: Array


def candidate(loss: Loss, x: Array, logits: Array, target: Array) -> Candidate:
    return Candidate(x, succeeded(loss, logits, target), loss(logits, target))


def nothing_yet(x: Array) -> Candidate:
    """The clean point with a rank below all others."""
    return Candidate(x, jnp.zeros(len(x), bool), jnp.full(len(x), -jnp.inf, jnp.promote_types(x.dtype, jnp.float32)))


def better(held: Candidate, new: Candidate, among: Array | None = None) -> Candidate:
    """Row by row the higher of two; the held one on ties, where the new loss is NaN and where ``among`` is false."""
    higher = (new.success > held.success) | ((new.success == held.success) & (new.loss > held.loss))
    take = higher & ~jnp.isnan(new.loss)
    if among is not None:
        take &= among
    per_row = take.reshape(-1, *[1] * (new.x.ndim - 1))
    return Candidate(
        jnp.where(per_row, new.x, held.x),
        jnp.where(take, new.success, held.success),
        jnp.where(take, new.loss, held.loss).astype(held.loss.dtype),
    )
