"""What was measured as a page: tables, pictures, hardware and versions."""

import importlib.metadata
import itertools
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from matplotlib.figure import Figure

from benchmarks.limit import Rates
from benchmarks.process import environment
from benchmarks.speed import Row
from benchmarks.work import Precision

PACKAGES = ("jax", "flax", "torch", "foolbox", "torchattacks", "adversarial-robustness-toolbox", "cleverhans")


def write(folder: Path, rates: Mapping[Precision, Rates], rounds: int, rows: Sequence[Row]) -> None:
    """``RESULTS.md`` and ``speed.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [row for row in rows if not row.sides["jaxnets"].missing]
    if drawn:
        speed_picture(folder / "speed.png", drawn)
    page = f"# Results\n\n{heading(rates, rounds)}\n\n{speed_table(rows)}\n\n![](speed.png)\n"
    (folder / "RESULTS.md").write_text(page)


def machine() -> str:
    """The processors, or the accelerators, that jax computes on."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} {jax.devices()[0].device_kind}"
    with open("/proc/cpuinfo") as lines:
        models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return f"{os.cpu_count()} cores of {', '.join(sorted(models)) or platform.processor()}"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def speed_table(rows: Sequence[Row]) -> str:
    """A line a work: its limit, and by side the median, how many times ours it is, and the spread."""
    sides = list(rows[0].sides)
    heads = ["work and rows", "arithmetic", "traffic", "jaxnets, rows a second", "first call", *sides]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        ours = row.sides["jaxnets"]
        least = [f"{_seconds(seconds)} ({ours.median / seconds:.1f})" for seconds in row.limit or ()] or ["-", "-"]
        speed = f"{row.work.rows / ours.median:.0f}"
        lines.append(_line([str(row.work), *least, speed, _seconds(ours.first), *(_cell(row, side) for side in sides)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, side: str) -> str:
    timing = row.sides[side]
    if timing.missing:
        return timing.missing
    spread = f"{_seconds(timing.least)}-{_seconds(timing.most)}"
    survivors = "" if math.isnan(timing.survivors) else f", {timing.survivors:.1%} left"
    times = "" if side == "jaxnets" else f"**{row.ratio(side):.2f}x** "
    return f"{times}{_seconds(timing.median)} ({spread}){survivors}"


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def speed_picture(path: Path, rows: Sequence[Row]) -> None:
    """How many times as long as jaxnets each side takes, a line of points a work; its arithmetic as a mark."""
    sides = [side for side in rows[0].sides if any(not row.sides[side].missing for row in rows)]
    figure = Figure(figsize=(9, 1 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for side, marker in zip(sides, itertools.cycle("osD^v<>ph"), strict=False):
        there = [(row.ratio(side), place) for place, row in enumerate(rows) if not row.sides[side].missing]
        axes.plot(*zip(*there, strict=True), marker, ms=5, label=side)
    bounds = [
        (row.limit.arithmetic / row.sides["jaxnets"].median, place) for place, row in enumerate(rows) if row.limit
    ]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), "k|", ms=10, mew=1.5, label="its arithmetic")
    axes.set_yticks(range(len(rows)), [str(row.work) for row in rows])
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.02)
    axes.set_xlabel("seconds of a call over those of jaxnets, medians")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def heading(rates: Mapping[Precision, Rates], rounds: int) -> str:
    settings = environment()
    products = " and ".join(f"{rate.flops / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in rates.items())
    bandwidth = max(rate.bytes for rate in rates.values())
    flags = " and ".join(f"`{name}={settings.get(name, '')}`" for name in ("XLA_FLAGS", "GLIBC_TUNABLES"))
    return (
        f"{machine()}. {versions()}.\n\n"
        f"Products of matrices run at {products}, sums of arrays at {bandwidth / 1e9:.0f} GB/s: "
        "the arithmetic and the traffic of a work are what the operations and the bytes of its gradients take at these "
        "rates (bytes that stay in caches take less), in brackets how many times that we take. Seconds are medians of "
        f"{rounds} calls after the first, all sides in turns, each in a process of its own; in brackets the least and "
        f"the most. All of them run under {flags}, those in JAX after `jaxnets.cpu.tune()`."
    )
