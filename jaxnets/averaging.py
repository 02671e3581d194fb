"""Averages of the weights over training: exponential ones, and those of stochastic weight averaging.

An average is kept in ``state.averaged``, parameters and statistics together: weights that are an average of many do not
go with the batch statistics of the last.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.classifier import Classifier
from jaxnets.training import Step, TrainState
from jaxnets.types import Array, Batch, Metrics, Params, Stats

Average = Callable[[Array, Any, Any], Any]
"""``(step, averaged, current) -> averaged``, where ``step`` counts the steps taken: 1 after the first."""


def with_average(step: Step, average: Average) -> Step:
    """The step, and after it the average of the parameters and statistics, in ``state.averaged``.

    Training starts from `init_average` of its state. An average is used as the last weights are:
    ``net.logits_fn(*state.averaged)``.

    >>> import optax
    >>> from jaxnets.training import init_state, make_step
    >>> fall = lambda w, stats, batch, key: (w, (stats, {}))
    >>> step = with_average(make_step(fall, optax.sgd(1.0)), ema(0.5, warm_up=1))
    >>> state = init_average(init_state(jax.random.key(0), jnp.zeros(()), {}, optax.sgd(1.0)))
    >>> for _ in range(2): state, _ = step(state, None)
    >>> print(state.params, state.averaged[0])
    -2.0 -1.25
    """

    def averaged_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        averaged = state.averaged
        if averaged is None:
            raise ValueError("the state keeps no average: start training from averaging.init_average(state)")
        state, metrics = step(state, batch)
        return state._replace(averaged=average(state.step, averaged, (state.params, state.stats))), metrics

    return averaged_step


def init_average(state: TrainState) -> TrainState:
    """The state with an average that is its parameters and statistics, in at least single precision.

    In less, an average soon stands still: what a step adds is rounded away.
    """
    return state._replace(averaged=jax.tree.map(_in_single, (state.params, state.stats)))


def ema(decay: float = 0.999, *, warm_up: float = 10.0) -> Average:
    """``averaged <- d averaged + (1 - d) current`` with ``d = min(decay, (1 + t) / (warm_up + t))`` at step ``t``.

    Without the warm-up the initial weights keep a share of ``decay^t``; with it early averages are short, and all of
    training is inside the later ones.

    Args:
      decay: in ``[0, 1)``; the average is over some ``1 / (1 - decay)`` steps.
      warm_up: at least 1, which is none.

    Polyak and Juditsky 1992; the warm-up is that of ``tf.train.ExponentialMovingAverage``.

    >>> print([f"{ema(0.9, warm_up=warm_up)(jnp.array(1), 0.0, 1.0):.3f}" for warm_up in (10, 1)])
    ['0.818', '0.100']
    """
    if not (0 <= decay < 1 and warm_up >= 1):
        raise ValueError(f"ema takes a decay in [0, 1) and a warm_up of at least 1, got {decay} and {warm_up}")

    def average(step: Array, averaged: Any, current: Any) -> Any:
        share = 1 - jnp.minimum(decay, (1 + step) / (warm_up + step))
        return _moved(averaged, current, share)

    return average


def swa(start: int, *, every: int = 1) -> Average:
    """Stochastic weight averaging: the mean of the weights at the steps ``start``, ``start + every``, and so on.

    Until then the average is the current weights. The mean of the statistics is only near the statistics of the mean:
    `statistics_of` computes those, as the paper does before evaluation.

    Args:
      start: number of steps taken, at least 1; the paper's is at three quarters of the training.
      every: steps between two that count; an epoch in the paper.

    Izmailov et al. 2018, https://arxiv.org/abs/1803.05407.

    >>> average, averaged = swa(2), 0.0
    >>> for step in (1, 2, 3, 4): averaged = average(jnp.array(step), averaged, float(step))
    >>> print(averaged)
    3.0
    """
    if start < 1 or every < 1:
        raise ValueError(f"swa takes a start and an interval of at least one step, got {start} and {every}")

    def average(step: Array, averaged: Any, current: Any) -> Any:
        counts = (step - start) % every == 0
        share = jnp.where(counts, 1 / (1 + jnp.maximum(step - start, 0) // every), 0)
        return _moved(averaged, current, jnp.where(step < start, 1, share))

    return average


def statistics_of(net: Classifier, params: Params, stats: Stats, batches: Iterable[Batch], *, key: Array) -> Stats:
    """The statistics that ``params`` have on ``batches``: means of those of each batch, all weighing the same.

    What a batch's own statistics are shows in how they move the averages from two starts, whatever the momentum. Where
    a network has none, or some that no batch moves, those of ``stats`` are returned.

    Args:
      net: the network.
      params: for example an average, whose statistics nobody has seen.
      stats: for their structure.
      batches: of training, each as large as there.
      key: of dropout.

    Raises:
      ValueError: without batches.

    Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2.
    """

    @jax.jit
    def of_batch(x: Array, key: Array) -> Stats:
        first = net.train(params, jax.tree.map(jnp.zeros_like, stats), x, key)[1]
        # As large as what is added to it, which would swamp a smaller one.
        start = jax.tree.map(lambda leaf: jnp.where(leaf == 0, 1, leaf), first)
        return jax.tree.map(_fixed_point, first, start, net.train(params, start, x, key)[1], stats)

    total, count = None, 0
    for count, batch in enumerate(batches, 1):
        seen = of_batch(batch.x, jax.random.fold_in(key, count))
        total = seen if total is None else jax.tree.map(jnp.add, total, seen)
    if total is None:
        raise ValueError("statistics_of needs at least one batch, got none")
    return jax.tree.map(lambda leaf: leaf / count, total)


def _moved(averaged: Any, current: Any, share: Array) -> Any:
    """A share of the way from the average to the current value; what is not a float has no average."""

    def move(before: Array, now: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(now), jnp.floating):
            return now
        moved = before + share * (now - before)
        # All the way is there, whatever was before.
        return jnp.where(share == 1, now, moved).astype(jnp.result_type(before))

    return jax.tree.map(move, averaged, current)


def _in_single(leaf: Array) -> Array:
    """A copy of it, in at least single precision where it is a float."""
    dtype = jnp.result_type(leaf)
    wide = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
    return jnp.array(leaf, wide)


def _fixed_point(from_zero: Array, start: Array, from_start: Array, otherwise: Array) -> Array:
    """Of ``s -> m s + (1 - m) b``, given its values at 0 and at a start, the value ``b`` that it does not move."""
    free = 1 - (from_start - from_zero) / start
    moves = free > 1e-6
    return jnp.where(moves, from_zero / jnp.where(moves, free, 1), otherwise)
