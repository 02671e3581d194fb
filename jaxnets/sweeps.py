"""Several networks in one compiled step: seeds, learning rates, epsilons or weights of an objective side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.checkpoint import Checkpoints
from jaxnets.draws import is_threefry
from jaxnets.fit import restore_best
from jaxnets.metrics import read_metrics, write_metrics
from jaxnets.training import Step, TrainState
from jaxnets.types import Array, Batch, Metrics

Over = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Maps a function over the leading axis of all leaves of its arguments: `jax.vmap` or `in_turn`."""


def sweep(step_of: Callable[[Any], Step], settings: Any, *, over: Over | None = None) -> Step:
    """The step of ``S`` networks at once, each with its own setting, state and batch: compiled once for all.

    ``(states, batches) -> (states, metrics)``, all with a leading axis ``[S]``: states from `stack`, batches
    ``x[S, B, ...]`` and ``y[S, B]``, which `fit.fit` makes. A member comes out as it does alone, but for rounding.

    Args:
      step_of: ``setting -> step``, such as `training.make_step` of an objective and an optimizer. It is traced once,
        with the setting's leaves as traced scalars: a learning rate, a threat with its epsilon, a beta.
      settings: a pytree with a leading axis ``[S]``; ``()`` where members differ in their states alone, as over seeds.
      over: `jax.vmap` or `in_turn`; unless given the faster on this backend.

    >>> import jaxnets as jn, optax
    >>> from jaxnets.training import init_state, make_step
    >>> fall = lambda w, stats, batch, key: (w * jnp.mean(batch.x), (stats, {}))
    >>> rates, start = jnp.array([0.25, 0.5]), init_state(jax.random.key(0), jnp.ones(()), {}, optax.sgd(0.0))
    >>> step = jax.jit(sweep(lambda rate: make_step(fall, optax.sgd(rate)), rates))
    >>> states, _ = step(stack([start, start]), Batch(jnp.ones((2, 4, 3)), jnp.zeros((2, 4), int)))
    >>> print(states.params)
    [0.75 0.5 ]
    """

    def one(setting: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step_of(setting)(state, batch)

    return lambda states, batches: (over or _faster(states.key))(one)(settings, states, batches)


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """One member after another, by `jax.lax.map`; each has all of the device, and the memory of one is enough.

    >>> print(in_turn(lambda a, b: a - b)(jnp.array([5, 7]), jnp.array([1, 2])))
    [4 5]
    """
    return lambda *arguments: jax.lax.map(lambda one: function(*one), arguments)


def stack(states: Sequence[TrainState]) -> TrainState:
    """The states of all members as one, with a leading axis ``[S]``."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def member(states: TrainState, number: int) -> TrainState:
    """The state of one member of a sweep, as if it had been trained alone."""
    return jax.tree.map(lambda leaf: leaf[number], states)


def write_members(run: Path, states: TrainState, folders: Sequence[Path]) -> None:
    """Writes each member's metrics, last and best states as `fit.fit` leaves those of one network.

    A state of the same step is there already where a process was killed here.

    Args:
      run: the folder that `fit.fit` was given for the sweep.
      states: the last.
      folders: of the members.
    """
    best = restore_best(run, states)
    rows = list(read_metrics(run / "metrics.jsonl"))
    for number, folder in enumerate(folders):
        write_metrics(folder / "metrics.jsonl", [_of_member(row, number) for row in rows])
        last = member(states, number)
        _save_once(Checkpoints(folder / "checkpoints"), int(last.step), last)
        if best is not None:
            scored = jax.tree.map(lambda leaf: leaf[number], best)  # noqa: B023
            _save_once(Checkpoints(folder / "best", keep=1), int(scored[0].step), scored)


def _of_member(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: value[number] if isinstance(value, list) else value for name, value in row.items()}


def _save_once(checkpoints: Checkpoints, step: int, tree: Any) -> None:
    if checkpoints.newest() != step:
        checkpoints.save(step, tree)


def _faster(key: Array) -> Over:
    """In turn on CPUs, whose convolutions with eight kernels at once, grouped ones, are slow; elsewhere together.

    Over several devices in turn as well: XLA shards grouped convolutions by gathering all rows, in every attack step.
    And with keys of another implementation than threefry, of which members together would draw what the first draws.

    Milliseconds a step of eight networks against PGD-5, batch 64, on two CPU cores (``benchmarks/sweeps.py``); on
    accelerators nothing was measured::

                            vmap   in turn   eight steps
        MLP on 8x8           1.9       1.9           2.6
        SmallCNN on 8x8     14.7      11.3          12.3
        SmallCNN on 28x28  202.6      84.7          80.3
    """
    together = jax.default_backend() != "cpu" and jax.device_count() == 1 and is_threefry(key)
    return jax.vmap if together else in_turn
