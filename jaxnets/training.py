"""Steps of training as pure functions of their state: one update by an objective's gradient, and free replays."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnets.data.augmentation import Augmentation, in_turn
from jaxnets.threats import Threat, a_row, check_one_a_row, each_row
from jaxnets.types import Array, Batch, Metrics, Objective, Params, Stats

Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
"""``(state, batch) -> (state, metrics)``."""


class TrainState(NamedTuple):
    """All that training needs to go on.

    Attributes:
      step: number of steps taken, int32.
      key: of the run; step ``t`` draws from ``fold_in(key, t)``.
      params, stats: of the network.
      opt_state: of the optimizer.
      averaged: averaged parameters and statistics, where an average is kept; else None.
      perturbation: of the rows of the last batch, ``[B, ...]``, in free adversarial training; else None.
    """

    step: Array
    key: Array
    params: Params
    stats: Stats
    opt_state: Any
    averaged: Any = None
    perturbation: Any = None


def init_state(key: Array, params: Params, stats: Stats, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # Of weak type in optax.lbfgs, and no longer after a step, for which a jitted step would be traced twice.
    strong = lambda leaf: jnp.asarray(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf  # noqa: E731
    return TrainState(jnp.zeros((), jnp.int32), key, params, stats, jax.tree.map(strong, optimizer.init(params)))


def make_step(objective: Objective, optimizer: optax.GradientTransformation) -> Step:
    """``(state, batch) -> (state, metrics)``: one update by the gradient of ``objective``. The caller jits it once.

    Optimizers that ask for the value, the gradient or the function itself (`optax.lbfgs`, `optax.polyak_sgd`) get them.
    ``params`` of a schedule-free optimizer are where its gradients are taken: evaluate
    `optax.contrib.schedule_free_eval_params` of ``opt_state`` and them.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def evaluate(params):
            return objective(params, state.stats, batch, key)

        (value, (stats, metrics)), gradient = jax.value_and_grad(evaluate, has_aux=True)(state.params)
        state = _updated(optimizer, state, value, gradient, lambda params: evaluate(params)[0])
        return state._replace(step=state.step + 1, stats=stats), metrics

    return step


def make_free_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    threat: Threat,
    replays: int = 8,
    step_size: Any = None,
    augmentations: Sequence[Augmentation] = (),
) -> Step:
    """Free adversarial training: every batch is replayed, and one backward pass a replay serves weights and attack.

    A replay at ``x' = project(x + delta)`` takes both gradients of the objective there, updates the parameters by the
    one, and by the other ``delta <- project(x' + step_size * direction(grad_x)) - x``. ``delta`` is kept over replays
    and over batches, in ``state.perturbation``, which before the first step holds zeros of the batch's shape::

        state = init_state(...)._replace(perturbation=jnp.zeros((batch_size, *shape)))

    ``state.step`` counts batches, the optimizer and its schedule count replays: with ``replays`` of 8, an eighth of the
    epochs costs what standard training does. Metrics are means over the replays, each before its update.

    Args:
      objective: given the perturbed rows; `objectives.standard` in the paper. It moves the batch statistics in every
        replay.
      optimizer: as for `make_step`.
      threat: ball and box.
      replays: of each batch, at least 1; 8 in the paper for CIFAR-10.
      step_size: in the threat's norm, scalar or ``[B]``; epsilon unless given.
      augmentations: of a batch, drawn once for all of its replays: a perturbation is one of the rows as they are seen.

    Raises:
      ValueError: for fewer than one replay, a perturbation that does not have the batch's shape, or another number of
        step sizes than rows.

    Shafahi et al. 2019, https://arxiv.org/abs/1904.12843.

    >>> import jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> optimizer, key = optax.sgd(0.1), jax.random.key(0)
    >>> step = make_free_step(jn.objectives.standard(net), optimizer, threat=jn.Linf(0.1), replays=4)
    >>> state = jax.eval_shape(lambda: init_state(key, *net.init(key, batch.x), optimizer))
    >>> state, metrics = jax.eval_shape(step, state._replace(perturbation=jnp.zeros((2, 3))), batch)
    >>> state.perturbation.shape
    (2, 3)
    """
    if replays < 1:
        raise ValueError(f"free adversarial training replays a batch at least once, got replays={replays}")
    step_size = threat.epsilon if step_size is None else step_size

    def ascend(threat: Threat, step_size: Array, gradient: Array, x_adv: Array, x: Array) -> Array:
        return threat.project(x_adv + step_size * threat.direction(gradient, x_adv), x)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_perturbation(state, batch)
        key = jax.random.fold_in(state.key, state.step)
        batch = in_turn(augmentations, jax.random.fold_in(key, replays), batch)
        check_one_a_row(batch.x, step_size=step_size)
        lengths = a_row(step_size, batch.x)

        def replay(carry: tuple[TrainState, Array], number: Array) -> tuple[tuple[TrainState, Array], Metrics]:
            state, x_adv = carry

            def evaluate(params, x):
                return objective(params, state.stats, batch._replace(x=x), jax.random.fold_in(key, number))

            (value, (stats, metrics)), (gradient, by_input) = jax.value_and_grad(evaluate, (0, 1), has_aux=True)(
                state.params, x_adv
            )
            state = _updated(optimizer, state, value, gradient, lambda params: evaluate(params, x_adv)[0])
            return (state._replace(stats=stats), each_row(ascend, threat, lengths, by_input, x_adv, batch.x)), metrics

        x_adv = each_row(type(threat).project, threat, batch.x + state.perturbation, batch.x)
        (state, x_adv), metrics = jax.lax.scan(replay, (state, x_adv), jnp.arange(replays))
        state = state._replace(step=state.step + 1, perturbation=x_adv - batch.x)
        return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)

    return step


def scheduled(step_at: Callable[[Array], Step]) -> Step:
    """The step ``step_at(t)`` at step ``t = 0, 1, ...``: settings that change as training goes on.

    Args:
      step_at: is traced once, with ``t`` as a traced int32: settings are functions of it, such as optax's schedules.

    >>> import jaxnets as jn
    >>> net, optimizer = jn.from_linen(jn.models.MLP((), classes=2)), optax.sgd(0.1)
    >>> epsilon, kappa = optax.linear_schedule(0.0, 0.3, 1000), optax.linear_schedule(1.0, 0.5, 1000)
    >>> certified = lambda t: jn.objectives.ibp(net, jn.Linf(epsilon(t)), kappa=kappa(t))
    >>> step = scheduled(lambda t: make_step(certified(t), optimizer))
    >>> x, key = jnp.zeros((2, 3)), jax.random.key(0)
    >>> state, metrics = step(init_state(key, *net.init(key, x), optimizer), Batch(x, jnp.array([0, 1])))
    >>> print(metrics["loss"])
    0.6931472
    """
    return lambda state, batch: step_at(state.step)(state, batch)


def _updated(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    value: Array,
    gradient: Params,
    value_fn: Callable[[Params], Array],
) -> TrainState:
    """The state with the optimizer's update of its parameters."""
    extras = {"value": value, "grad": gradient, "value_fn": value_fn}
    # By what it takes and not by its type: `optax.MultiSteps` hands on what it is given, and has none of the types.
    kinds = {parameter.kind for parameter in inspect.signature(optimizer.update).parameters.values()}
    extras = extras if inspect.Parameter.VAR_KEYWORD in kinds else {}
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, **extras)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def _check_perturbation(state: TrainState, batch: Batch) -> None:
    shape = None if state.perturbation is None else state.perturbation.shape
    if shape != batch.x.shape:
        raise ValueError(
            f"free adversarial training keeps a perturbation of the batch's shape {batch.x.shape}, got {shape}: "
            "state._replace(perturbation=jnp.zeros(shape)) before the first step, and batches of one size"
        )
