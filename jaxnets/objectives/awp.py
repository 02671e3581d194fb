"""Adversarial weight perturbation, around any objective."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.folds import length
from jaxnets.objectives.directions import unit
from jaxnets.objectives.minmax import MinMax, halves
from jaxnets.types import Array, Batch, Metrics, Objective, Params, Stats


def awp(objective: Objective, *, gamma: Any = 0.01) -> MinMax:
    """An objective at the worst weights near by: ``min_w max_v L(w + v)`` with ``|v_l| <= gamma |w_l|`` in layer ``l``.

    One normalised step of ascent, ``v_l = gamma |w_l| g_l / |g_l|`` with ``g`` the gradient at ``w``, on weights of two
    or more dimensions; biases and the scales of normalisation stay. What comes out is the gradient at ``w + v``, for an
    update of ``w``: nothing needs to be restored. An objective with an attack is perturbed on the rows that the attack
    finds at ``w``. It costs one parameter gradient; the batch statistics move as ``L(w + v)`` moves them.

    Args:
      objective: such as `adversarial` or `trades`.
      gamma: size of the perturbation relative to the layer's; 0.01 for the authors' `adversarial`, 0.005 for `trades`.

    Wu et al. 2020, https://arxiv.org/abs/2004.05884. The authors' code takes this step by an optimizer on a copy of the
    network; normalised, its rate is of no consequence.

    >>> def square(params, stats, batch, key):
    ...     value = jnp.sum(params["kernel"] ** 2) / 2
    ...     return value, (stats, {"loss": value})
    >>> raised = jax.jit(awp(square, gamma=0.1))
    >>> print(raised({"kernel": jnp.array([[3.0, 4.0]])}, {}, None, jax.random.key(0))[0])  # 5.5 ** 2 / 2
    15.125
    """
    game = halves(objective)

    def outer(
        params: Params, stats: Stats, batch: Batch, examples: Any, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        def at(weights: Params) -> tuple[Array, tuple[Stats, Metrics]]:
            return game.outer(weights, stats, batch, examples, key)

        fixed = jax.lax.stop_gradient(params)
        gradient, _ = jax.grad(at, has_aux=True)(fixed)
        away = jax.tree_util.tree_map_with_path(partial(_away, gamma), fixed, gradient)
        return at(jax.tree.map(jnp.add, params, away))

    return replace(game, outer=outer)


def _away(gamma: Any, path: Any, weights: Array, gradient: Array) -> Array:
    # The biases of attention have two dimensions.
    if weights.ndim < 2 or jax.tree_util.keystr(path[-1:], simple=True) == "bias":
        return jnp.zeros_like(weights)
    return (gamma * length(weights) * unit(gradient)).astype(weights.dtype)
