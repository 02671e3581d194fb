"""The numbers of a run while it trains: their file, and what is shown of them."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

_log = logging.getLogger(__name__)


class MetricsLog:
    """Lines of JSON, one a step: ``{"step": 1, "loss": 2.3, ...}``; in a sweep a value is a list of the members'.

    A step's metrics are read when the next one comes.

    Args:
      path: appended to, after lines later than ``keep_until`` and a line broken by a kill are taken away.
      keep_until: the step from which the run goes on.
    """

    def __init__(self, path: Path, *, keep_until: int):
        write_metrics(path, [row for row in read_metrics(path) if row["step"] <= keep_until])
        self._file = path.open("a")
        self._pending: tuple[int, dict[str, Any]] | None = None

    def late(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Holds this step's metrics back and returns the last step's, now written."""
        written = self._write_pending()
        self._pending = (step, metrics)
        return written

    def now(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
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

    def _write_pending(self) -> dict[str, Any]:
        pending, self._pending = self._pending, None
        if pending is None:
            return {}
        step, metrics = pending
        values = self._write(step, metrics)
        if not np.isfinite(values.get("loss", 0.0)).any():
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {step}: lower the learning rate, or look for labels that are no "
                "classes of the network"
            )
        return values

    def _write(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        values = {name: np.asarray(value, float).tolist() for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        return values


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file. A damaged one is left out: the last, which a kill cuts short, without a warning."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            yield row
        elif number < len(lines):
            _log.warning("%s, line %d is damaged: it is left out, those after it stay", path, number)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # no JSON, or bytes that are no text
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def write_metrics(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A metrics file of these lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)


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

    def show(self, values: dict[str, Any], *, evaluated: bool = False) -> None:
        """Tells of a step, or of an evaluation; in a sweep of the members' mean."""
        values = {name: float(np.mean(value)) for name, value in values.items()}
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
