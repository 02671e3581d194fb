"""Which of two perturbed points of a row is the better attack: first whether it succeeds, then by its loss.

By loss alone a row that is still right can beat one that is already wrong.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxnets.losses import succeeded
from jaxnets.threats import Threat
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


class Nearest(NamedTuple):
    """Each row's smallest successful perturbation so far: ``x[B, ...]`` and its size ``[B]``, infinite at first."""

    x: Array
    size: Array


def nothing_found(x: Array) -> Nearest:
    """The clean point, at an infinite distance."""
    return Nearest(x, jnp.full(len(x), jnp.inf, jnp.promote_types(x.dtype, jnp.float32)))


def nearer(held: Nearest, x_new: Array, success: Array, size: Array) -> Nearest:
    """Row by row the new point where it succeeds and is smaller than the one held."""
    take = success & (size < held.size)
    x = jnp.where(take.reshape(-1, *[1] * (x_new.ndim - 1)), x_new, held.x)
    return Nearest(x, jnp.where(take, size, held.size).astype(held.size.dtype))


def within(held: Nearest, threat: Threat, x: Array) -> Array:
    """What a minimum-norm attack returns: the smallest perturbation, or the clean row where that is beyond epsilon."""
    return jnp.where((held.size <= threat.epsilon).reshape(-1, *[1] * (x.ndim - 1)), held.x, x)
