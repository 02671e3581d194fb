"""How long jaxnets takes to be there: imports, help, the first epoch of training.

Command: ``python -m benchmarks.startup``. Each line is a fresh process; medians of interleaved rounds. An epoch of
digits has 22 steps, after which metrics are written; the second run finds the programs of the first in the compilation
cache.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

EVERYTHING = (
    "attacks, averaging, certificates, checkpoint, data, diagnostics, evaluation, fit, losses, models, objectives, "
    "optimizers, parallel, plots, sweeps, threats, training, types, verification, weights"
)


@dataclass(frozen=True)
class Settings:
    """Time imports, help and the first epoch of training."""

    rounds: int = 5
    model: str = "small_cnn"
    """What is trained."""


def main(settings: Settings) -> dict[str, float]:
    """A line a thing: median seconds."""
    calls: dict[str, Callable[[], float]] = {
        "import jax, flax, optax": lambda: _python("import jax, flax, optax"),
        "import jaxnets": lambda: _python("import jaxnets"),
        "import all of jaxnets": lambda: _python(f"from jaxnets import {EVERYTHING}"),
        "jaxnets --help": lambda: _python(
            "import sys; sys.argv = ['jaxnets', '--help']; import jaxnets.cli as c; c.main()"
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        calls["first epoch, first run"] = lambda: _first_epoch(settings.model, place, forget=True)
        calls["first epoch, second run"] = lambda: _first_epoch(settings.model, place, forget=False)
        times = {name: [] for name in calls}
        for _ in range(settings.rounds):
            for name, call in calls.items():
                times[name].append(call())
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in found.items():
        print(f"{name:26}{seconds:8.2f} s")
    return found


def _python(code: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def _first_epoch(model: str, place: Path, *, forget: bool) -> float:
    """From the start of ``jaxnets train`` to the metrics of its first epoch."""
    if forget:
        shutil.rmtree(place / "cache", ignore_errors=True)
    out = place / "run"
    shutil.rmtree(out, ignore_errors=True)
    code = "from jaxnets import cli; cli.main()"
    command = [sys.executable, "-c", code, "train", "--model", model, "--epochs", "9", "--out", str(out)]
    began = time.monotonic()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(
                    f"startup: training of {model} ended before its first epoch; try the command by itself"
                )
            time.sleep(0.01)
        seconds = time.monotonic() - began
        process.kill()
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Settings))
