"""The loop of training: steps, progress, evaluation, metrics, checkpoints. A killed run goes on where it was."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxnets import parallel
from jaxnets.checkpoint import Checkpoints
from jaxnets.data import Split, batch_indices, steps_per_epoch, to_float
from jaxnets.training import TrainState, make_step
from jaxnets.types import Array, Batch, Objective

Evaluate = Callable[[TrainState], dict[str, float]]

# The stream of the data's order; no run takes this many steps, so no step draws from it.
_ORDER = 2**32 - 1


def fit(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    split: Split,
    *,
    folder: Path,
    epochs: int,
    batch_size: int,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    checkpoint_every: int | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains until ``epochs`` epochs are done and returns the last state.

    ``folder`` receives ``metrics.jsonl``, a line a step and a line an evaluation, and ``checkpoints/``. Where it holds
    checkpoints already, training continues from the newest whole one; parameters and metrics come out bit-identical to
    those of a run that was never stopped. Step ``t`` takes the rows ``batch_indices(..., t)``; metrics are read a step
    late, so that the device never waits for the host.

    Args:
      objective: what to lower.
      optimizer: by which.
      state: the state before the first step, from `training.init_state`; it is copied, not donated.
      split: rows to train on.
      folder: of the run.
      epochs: passes over the rows, each of ``n // batch_size`` steps.
      batch_size: rows a step, over all devices.
      evaluate: ``state -> {name: value}``, called after every ``evaluate_every``-th epoch and the last.
      evaluate_every: in epochs.
      checkpoint_every: in steps; an epoch unless given. The last step is always saved.
      mesh: devices; all of them unless given.

    Raises:
      ValueError: where the batch does not divide over the devices or exceeds the rows.
      CheckpointError: where checkpoints exist and none can be read.
      FloatingPointError: where the loss is no longer finite.
    """
    mesh = parallel.data_mesh() if mesh is None else mesh
    parallel.check_divisible(batch_size, mesh)
    per_epoch = steps_per_epoch(len(split.labels), batch_size)
    total = epochs * per_epoch
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    restored = checkpoints.restore(state)
    state = parallel.replicate(jax.tree.map(jnp.copy, state if restored is None else restored), mesh)
    first = int(state.step)

    step = jax.jit(make_step(objective, optimizer), donate_argnums=0, out_shardings=parallel.replicated(mesh))
    batch_at = _batches(split, jax.random.fold_in(state.key, _ORDER), batch_size, mesh)
    log = MetricsLog(Path(folder) / "metrics.jsonl", keep_until=first)
    progress = Progress(first, total, per_epoch, batch_size)

    with log, progress:
        for done in range(first + 1, total + 1):
            state, metrics = step(state, batch_at(done - 1))
            progress.show(log.late(done, metrics))
            is_last = done == total
            if evaluate and (is_last or done % (evaluate_every * per_epoch) == 0):
                progress.show(log.now(done, evaluate(state)), evaluated=True)
            if is_last or done % (checkpoint_every or per_epoch) == 0:
                log.flush()
                checkpoints.save(done, state)
    return state


def _batches(split: Split, key: Array, batch_size: int, mesh: Mesh) -> Callable[[int], Batch]:
    """``step -> Batch``: bytes live on every device, rows are gathered and made floats there, split by rows."""
    images, labels = parallel.replicate((split.images, split.labels), mesh)

    @partial(jax.jit, out_shardings=parallel.by_rows(mesh))
    def gather(images, labels, rows):
        return Batch(to_float(images[rows]), labels[rows])

    return lambda step: gather(images, labels, batch_indices(key, step, len(split.labels), batch_size))


class MetricsLog:
    """Lines of JSON, one a step: ``{"step": 1, "loss": 2.3, ...}``. A step's metrics are read when the next one comes.

    Args:
      path: appended to, after lines later than ``keep_until`` and a line broken by a kill are taken away.
      keep_until: the step from which the run goes on.
    """

    def __init__(self, path: Path, *, keep_until: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= keep_until]
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept))
        draft.replace(path)
        self._file = path.open("a")
        self._pending: tuple[int, dict[str, Any]] | None = None

    def late(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Holds this step's metrics back and returns the last step's, now written."""
        written = self._write_pending()
        self._pending = (step, metrics)
        return written

    def now(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Writes at once, after what was held back."""
        self._write_pending()
        return self._write(step, values)

    def flush(self) -> None:
        """Puts all lines on disk."""
        self._write_pending()
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _write_pending(self) -> dict[str, float]:
        pending, self._pending = self._pending, None
        if pending is None:
            return {}
        step, metrics = pending
        values = self._write(step, {name: float(value) for name, value in metrics.items()})
        if not np.isfinite(values.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {values['loss']} at step {step}: lower the learning rate")
        return values

    def _write(self, step: int, values: dict[str, float]) -> dict[str, float]:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        return values


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class Progress:
    """Loss, accuracies, examples a second and the time left: a bar on a terminal, else a line an evaluation or 30 s."""

    _SECONDS_A_LINE = 30.0

    def __init__(self, first: int, total: int, per_epoch: int, batch_size: int):
        self._first, self._total, self._per_epoch, self._batch_size = first, total, per_epoch, batch_size
        self._done, self._shown, self._recent = first, {}, {}
        self._began = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=first, unit="ex", unit_scale=batch_size, dynamic_ncols=True, mininterval=0.2
            )  # fmt: skip

    def show(self, values: dict[str, float], *, evaluated: bool = False) -> None:
        """Tells of a step, or of an evaluation."""
        if evaluated:
            self._shown = values
        else:
            self._done += 1
            # Single batches jump about: a running mean over some fifty of them is readable.
            weight = max(0.02, 1 / (self._done - self._first))
            for name, value in values.items():
                self._recent[name] = (1 - weight) * self._recent.get(name, value) + weight * value
        text = {name: f"{value:.3f}" for name, value in {**self._recent, **self._shown}.items()}
        if self._bar is not None:
            self._bar.set_postfix(text, refresh=False)
            self._bar.update(0 if evaluated else 1)
        elif evaluated or time.monotonic() - self._last_line > self._SECONDS_A_LINE:
            self._print(text)

    def _print(self, text: dict[str, str]) -> None:
        self._last_line = time.monotonic()
        per_second = (self._done - self._first) / max(self._last_line - self._began, 1e-9)
        left = (self._total - self._done) / max(per_second, 1e-9)
        values = "  ".join(f"{name} {value}" for name, value in text.items())
        print(
            f"epoch {self._done / self._per_epoch:.1f}/{self._total // self._per_epoch}  {values}  "
            f"{per_second * self._batch_size:.0f} ex/s  {left:.0f} s left",
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
