"""A side in a process of its own, asked for one call after another, so that sides can take turns.

``python -m benchmarks.process SIDE`` reads a work a line and answers each with a line of JSON: the seconds of one call,
and of an attack how many rows survive it, or why there is no answer.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sides import NotOfferedError
from benchmarks.work import Work, parse


class Answer(NamedTuple):
    """Of one call.

    Attributes:
      seconds: that it took; NaN where there is no answer.
      survivors: the share of rows still right after an attack, judged by the network in JAX; NaN for training.
      missing: why there is no answer; empty otherwise.
    """

    seconds: float = np.nan
    survivors: float = np.nan
    missing: str = ""


def environment() -> dict[str, str]:
    """Of all sides, with settings of memory unless the caller has his own."""
    # Huge pages, kept once the system has given them: a program's memory is new in every call, and on some machines
    # costs a third of a training step.
    tunables = "hugetlb=1", "arena_max=1", f"mmap_threshold={1 << 30}", f"trim_threshold={1 << 34}"
    malloc = ":".join(f"glibc.malloc.{one}" for one in tunables)
    # A GPU is shared: a process in JAX would take most of it at its start.
    return {"GLIBC_TUNABLES": malloc, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ


class Side:
    """A side, ready to be asked. It answers the same work faster the second time, for the first compiles.

    Args:
      name: of `sides`.
      data_dir: of data sets.
      settings: of the environment, beside those of `environment`.
    """

    def __init__(self, name: str, *, data_dir: Path | None = None, settings: Mapping[str, str] = MappingProxyType({})):
        place = [str(data_dir)] if data_dir else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.process", name, *place],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment() | settings,
        )  # fmt: skip

    def ask(self, work: Work) -> Answer:
        """Waits for one call."""
        if self._process.poll() is not None:
            return Answer(missing="its process has ended")
        print(work, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()  # pyright: ignore
        return Answer(**json.loads(line)) if line else Answer(missing="its process has ended")

    def close(self) -> None:
        self._process.communicate()


def serve(name: str, data_dir: Path | None) -> None:
    """Answers until there are no more questions. What the libraries print goes to standard error."""
    warnings.simplefilter("ignore")
    calls: dict[Work, tuple[Callable[[], Any], Callable[[Any], float]]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(name, parse(line.strip()), calls, data_dir)._asdict()), file=answers, flush=True)


def _answer(name: str, work: Work, calls: dict[Work, Any], data_dir: Path | None) -> Answer:
    try:
        if work not in calls:
            # One work at a time: the memory of the one before is free again.
            calls.clear()
            calls[work] = _prepared(name, work, data_dir)
        call, survivors = calls[work]
        began = time.perf_counter()
        found = call()
        return Answer(time.perf_counter() - began, survivors(found))
    except NotOfferedError:
        return Answer(missing="not offered")
    except ImportError as error:
        return Answer(missing=f"not installed ({error.name})")
    except Exception as error:
        # A peer may fail in any way, and the others go on.
        traceback.print_exc()
        return Answer(missing=f"failed: {type(error).__name__}")


def _prepared(name: str, work: Work, data_dir: Path | None) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    import jax

    from benchmarks import networks

    side = importlib.import_module(f"benchmarks.sides.{name}")
    loaded = networks.load(work.network, data_dir=data_dir, rows=work.rows, precision=work.precision)
    model = jax.jit(loaded.model)
    right = np.argmax(model(loaded.x), axis=-1) == loaded.y

    def survivors(x_adv: Any) -> float:
        return np.nan if work.trains else float((right & (np.argmax(model(x_adv), axis=-1) == loaded.y)).mean())

    return side.make(work, loaded), survivors


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
