"""One step of training as a pure function of its state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnets.types import Array, Batch, Metrics, Objective, Params, Stats


class TrainState(NamedTuple):
    """All that training needs to go on.

    Attributes:
      step: number of steps taken, int32.
      key: of the run; step ``t`` draws from ``fold_in(key, t)``.
      params, stats: of the network.
      opt_state: of the optimizer.
      averaged: averaged parameters and statistics, where an average is kept; else None.
    """

    step: Array
    key: Array
    params: Params
    stats: Stats
    opt_state: Any
    averaged: Any = None


def init_state(key: Array, params: Params, stats: Stats, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # Of weak type in optax.lbfgs, and no longer after a step, for which a jitted step would be traced twice.
    strong = lambda leaf: jnp.asarray(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf  # noqa: E731
    return TrainState(jnp.zeros((), jnp.int32), key, params, stats, jax.tree.map(strong, optimizer.init(params)))


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """``(state, batch) -> (state, metrics)``: one update by the gradient of ``objective``. The caller jits it once.

    Optimizers that ask for the value, the gradient or the function itself (`optax.lbfgs`, `optax.polyak_sgd`) get them.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def evaluate(params):
            return objective(params, state.stats, batch, key)

        (value, (stats, metrics)), gradient = jax.value_and_grad(evaluate, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(
            gradient, state.opt_state, state.params, value=value, grad=gradient, value_fn=lambda p: evaluate(p)[0]
        )
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, stats=stats, opt_state=opt_state), metrics

    return step
