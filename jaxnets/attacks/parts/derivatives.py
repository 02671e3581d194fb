"""Derivatives of a classifier with respect to its input alone, a row at a time."""

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import checked_logits
from jaxnets.attacks.parts.stochastic import Stochastic, mean_over_draws
from jaxnets.types import Array, LogitsFn, Loss


def input_gradient(logits_fn: LogitsFn, loss: Loss, x: Array, target: Array) -> tuple[Array, Array]:
    """The gradient ``[B, ...]`` of every row's own loss with respect to that row, and the logits ``[B, K]``.

    Rows are summed, never averaged: a mean would scale gradients by the batch size. For a `Stochastic` model both are
    means over its draws.
    """

    def total(z, model):
        logits = checked_logits(model(z), z)
        return jnp.sum(loss(logits, target)), logits

    one = jax.grad(total, has_aux=True)
    if not isinstance(logits_fn, Stochastic):
        return one(x, logits_fn)
    return mean_over_draws(lambda model: one(x, model), logits_fn, len(x))


def class_gradients(logits_fn: LogitsFn, x: Array) -> tuple[Array, Array]:
    """The logits ``[B, K]`` and the gradient of each with respect to its row, ``[B, K, ...]``: K backward passes."""
    logits, pull_back = jax.vjp(lambda z: checked_logits(logits_fn(z), z), x)
    seeds = jnp.broadcast_to(jnp.eye(logits.shape[1], dtype=logits.dtype)[:, None], (logits.shape[1], *logits.shape))
    gradients = jax.vmap(lambda seed: pull_back(seed)[0])(seeds)
    return logits, jnp.moveaxis(gradients, 0, 1)
