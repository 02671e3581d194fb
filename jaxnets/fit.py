"""The loop of training: steps, progress, evaluation, metrics, checkpoints. A killed run goes on where it was."""

import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxnets import parallel
from jaxnets.checkpoint import Checkpoints, alone_in
from jaxnets.data import Split, epoch_order, steps_per_epoch, to_float
from jaxnets.data.sources import check_pairs
from jaxnets.metrics import MetricsLog, Progress
from jaxnets.training import Step, TrainState
from jaxnets.types import Array, Batch

Evaluate = Callable[[TrainState], dict[str, Any]]
"""``state -> {name: number}``; of the states of a sweep, ``{name: numbers[S]}``."""
Score = Callable[[dict[str, Any]], Any]
"""What `Evaluate` gives ``-> number`` or ``numbers[S]``, higher is better."""

# The stream of the data's order; no run takes this many steps, so no step draws from it.
_ORDER = 2**32 - 1


def fit(
    step: Step,
    state: TrainState,
    split: Split,
    *,
    folder: Path,
    epochs: int,
    batch_size: int,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    score: Score | None = None,
    patience: int | None = None,
    checkpoint_every: int | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains until ``epochs`` epochs are done and returns the last state.

    ``folder`` receives ``metrics.jsonl``, a line a step and a line an evaluation, ``checkpoints/`` and, with a score,
    ``best/``. Where it holds checkpoints already, training continues from the newest whole one; parameters and metrics
    come out bit-identical to those of a run that was never stopped. Step ``t`` takes the rows
    ``batch_indices(..., t)``; metrics are read a step late, so that the device never waits for the host.

    Args:
      step: `training.make_step` of an objective and an optimizer, `training.make_free_step`, either of them in
        `averaging.with_average`, or several in `sweeps.sweep`; it is compiled once.
      state: the state before the first step, from `training.init_state`; it is copied, not donated. For a sweep that of
        `sweeps.stack`: each member takes rows in an order of its own.
      split: rows to train on.
      folder: of the run.
      epochs: passes over the rows, each of ``n // batch_size`` steps.
      batch_size: rows a step, over all devices.
      evaluate: a function of the state alone, called after every ``evaluate_every``-th epoch and the last.
      evaluate_every: in epochs.
      score: of the values that ``evaluate`` gives. The state that scores highest is kept, see `restore_best`: robust
        accuracy on held-out rows often falls while training goes on (Rice et al. 2020,
        https://arxiv.org/abs/2002.11569).
      patience: evaluations in a row without a better score after which training ends; of a sweep, of any member's.
      checkpoint_every: in steps; an epoch unless given. The last step is always saved.
      mesh: devices along an automatic axis ``data``, as of `parallel.data_mesh`; all of them unless given.

    Raises:
      ValueError: where the batch does not divide over the devices or exceeds the rows, for a raw key in the state,
        another number of images than of labels, counts below 1, a score without an evaluation or one that is no number,
        and a patience without a score.
      CheckpointError: where checkpoints exist and none can be read.
      BusyError: where another process trains in the folder.
      FloatingPointError: where the loss is no longer finite, in a sweep that of no member.
    """
    if not jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"fit takes a state with keys of jax.random.key, got {state.key.dtype}{list(state.key.shape)}")
    _check_stopping(evaluate, score, patience)
    _check_counts(epochs=epochs, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
    check_pairs(split)
    folder = Path(folder)
    mesh = parallel.mesh_or_all(mesh)
    parallel.check_divisible(batch_size, mesh)
    per_epoch = steps_per_epoch(len(split.labels), batch_size)
    total, interval = epochs * per_epoch, evaluate_every * per_epoch
    with alone_in(folder):
        checkpoints = Checkpoints(folder / "checkpoints")
        restored = checkpoints.restore(state)
        if restored is None:
            shutil.rmtree(folder / "best", ignore_errors=True)  # of a training that is gone
        state = parallel.replicate(jax.tree.map(jnp.copy, state if restored is None else restored), mesh)
        done = int(jnp.max(state.step))

        compiled = jax.jit(step, donate_argnums=0, out_shardings=parallel.replicated(mesh))
        batch_at = _batches(split, state.key, batch_size, mesh)
        best = Best(folder / "best", state, score) if score else None
        log = MetricsLog(folder / "metrics.jsonl", keep_until=done)
        progress = Progress(done, total, per_epoch, batch_size * state.key.size)

        def is_over() -> bool:
            return done >= total or bool(best and patience and best.evaluations_since(done, interval) >= patience)

        with log, progress:
            while not is_over():
                state, metrics = compiled(state, batch_at(done))
                done += 1
                progress.show(log.late(done, metrics))
                if evaluate and (done == total or done % interval == 0):
                    values = log.now(done, evaluate(state))
                    progress.show(values, evaluated=True)
                    # Before the checkpoint: a run that is killed between the two comes to this step and its best again.
                    if best:
                        best.offer(done, state, values)
                if is_over() or done % (checkpoint_every or per_epoch) == 0:
                    log.flush()
                    checkpoints.save(done, state)
        return state


def restore_best(folder: Path, like: TrainState) -> tuple[TrainState, np.ndarray] | None:
    """The state of a run's highest score and that score, in a sweep each member's; None where nothing was scored.

    Args:
      folder: of the run.
      like: a state of the same structure, as for `checkpoint.Checkpoints.restore`.

    Raises:
      CheckpointError: where it cannot be read.
    """
    kept = Path(folder) / "best"
    return Checkpoints(kept, keep=1).restore(_scored(like)) if kept.exists() else None


def _scored(like: TrainState) -> tuple[TrainState, np.ndarray]:
    return like, np.zeros(like.step.shape)


class Best:
    """The state of the highest score so far, on disk; in a sweep each member's.

    Args:
      folder: of that state alone.
      like: a state of the same structure.
      score: of the values of an evaluation.
    """

    def __init__(self, folder: Path, like: TrainState, score: Score):
        self._kept, self._score_of = Checkpoints(folder, keep=1), score
        restored = self._kept.restore(_scored(like))
        self._step, self._score = (0, None) if restored is None else (int(np.max(restored[0].step)), restored[1])

    def evaluations_since(self, done: int, interval: int) -> int:
        """How many of the evaluations up to step ``done``, one every ``interval`` steps, came after the best's."""
        return 0 if self._score is None else done // interval - self._step // interval

    def offer(self, done: int, state: TrainState, values: dict[str, Any]) -> None:
        """Keeps the state of step ``done`` where it scores higher than all before."""
        # A best state of a later step is from before a kill: the run comes to it again.
        if done <= self._step:
            return
        score = np.asarray(self._score_of(values), float)
        if score.shape != state.step.shape or np.isnan(score).any():
            raise ValueError(f"score must give a number for each network, got {score} at step {done}")
        better = np.full(score.shape, True) if self._score is None else score > self._score
        if not better.any():
            return
        if not better.all():
            state = _chosen(better, state, self._kept.restore(_scored(state)))
        self._step, self._score = done, score if self._score is None else np.where(better, score, self._score)
        self._kept.save(done, (state, self._score))


def _chosen(better: np.ndarray, state: TrainState, kept: Any) -> TrainState:
    """The new state of the members that are better, of the others the one that was kept."""

    def choose(new: Array, old: Any) -> Array:
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, state, kept[0])


def _check_stopping(evaluate: Evaluate | None, score: Score | None, patience: int | None) -> None:
    if score and not evaluate:
        raise ValueError("score takes the values of an evaluation: give fit an evaluate too")
    if patience is not None and (patience < 1 or not score):
        raise ValueError(
            f"patience counts evaluations without a better score, from 1 on, got {patience}, score={score}"
        )


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (count < 1 or count != int(count)):
            raise ValueError(f"{name} must be a whole number from 1 on, got {count}")


def _batches(split: Split, key: Array, batch_size: int, mesh: Mesh) -> Callable[[int], Batch]:
    """``step -> Batch``: bytes live on every device, rows are gathered and made floats there, split by rows.

    For keys ``[S]``, the rows are ``[S, batch_size, ...]``, in an order for each key.
    """
    images, labels = parallel.replicate((split.images, split.labels), mesh)
    count, keys = len(split.labels), [jax.random.fold_in(one, _ORDER) for one in key.reshape(-1)]

    @lru_cache(maxsize=1)
    def orders(epoch: int) -> np.ndarray:
        return np.stack([epoch_order(one, epoch, count) for one in keys]).reshape(*key.shape, count)

    @partial(jax.jit, out_shardings=parallel.by_rows(mesh, axis=key.ndim))
    def gather(images, labels, rows):
        return Batch(to_float(images[rows]), labels[rows])

    def at(step: int) -> Batch:
        epoch, place = divmod(step, steps_per_epoch(count, batch_size))
        return gather(images, labels, orders(epoch)[..., place * batch_size : (place + 1) * batch_size])

    return at
