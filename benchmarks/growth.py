"""How time and memory of attacks grow, beside what the arithmetic says.

``python -m benchmarks.growth`` measures PGD on a residual network of width 8 unless said, and an evaluation by it, and
draws ``growth.png``: an exponent is the slope over the larger half of a curve, in logarithms.
"""

import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

import jaxnets as jn
from benchmarks.timing import seconds


class Point(NamedTuple):
    """Of one size: seconds of a call, bytes that it needs besides what it is given."""

    size: int
    seconds: float
    bytes: float


class Growth(NamedTuple):
    """What grows.

    Attributes:
      sizes: at which it is measured.
      measure: at one of them.
      seconds, bytes: exponents that the arithmetic says.
    """

    sizes: tuple[int, ...]
    measure: Callable[[int], Point]
    seconds: float
    bytes: float


def attack(size: int, *, batch: int = 32, side: int = 32, steps: int = 5, width: int = 8) -> Point:
    """PGD in one program."""
    net = jn.from_linen(jn.models.resnet18(10, width=width, stem=jn.models.cifar_stem))
    x, y = jax.random.uniform(jax.random.key(0), (batch, side, side, 3)), jnp.arange(batch) % 10
    model = jax.tree_util.Partial(net.logits_fn(*net.init(jax.random.key(1), x)))
    run = jax.jit(partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=steps))
    program = run.lower(jax.random.key(2), model, x, y).compile()
    taken = _median(lambda: program(jax.random.key(2), model, x, y))
    return Point(size, taken, program.memory_analysis().temp_size_in_bytes)


def evaluation(size: int) -> Point:
    """`evaluation.evaluate` of so many rows by PGD, 256 at once; memory is that of the process."""
    net = jn.from_linen(jn.models.SmallCNN())
    x = np.random.default_rng(0).uniform(size=(size, 28, 28, 1)).astype(np.float32)
    model = net.logits_fn(*net.init(jax.random.key(1), x[:1]))
    y = np.argmax(np.concatenate([model(rows) for rows in np.array_split(x, -(-size // 256))]), axis=-1)
    pgd = {"pgd": partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=20)}
    call = partial(jn.evaluation.evaluate, jax.random.key(0), model, x, y, pgd, threat=jn.Linf(0.1), batch_size=256)
    return Point(size, _median(call), 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _median(call: Callable[[], Any], rounds: int = 5) -> float:
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


GROWTHS = {
    # First, for a process's memory only rises.
    "rows evaluated": Growth((256, 512, 1024, 2048, 4096, 8192), evaluation, 1, 1),
    "batch": Growth((8, 16, 32, 64, 128, 256), lambda size: attack(size, batch=size), 1, 1),
    "image side": Growth((8, 16, 32, 64, 128), lambda size: attack(size, side=size), 2, 2),
    "steps": Growth((2, 4, 8, 16, 32, 64), lambda size: attack(size, steps=size), 1, 0),
    "width": Growth((4, 8, 16, 32, 64), lambda size: attack(size, width=size), 2, 1),
}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of ``log value`` over ``log size``, by least squares over the larger half.

    >>> exponent([1, 2, 4, 8], [5.0, 5.0, 10.0, 40.0])
    2.0
    """
    half = len(sizes) // 2
    return round(float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0]), 2)


@dataclass(frozen=True)
class Settings:
    """Measure how time and memory grow, and draw it."""

    only: tuple[str, ...] = tuple(GROWTHS)
    """What grows."""
    out: Path = Path("benchmarks")


def main(settings: Settings) -> dict[str, list[Point]]:
    """A line a size, an exponent a curve, one picture."""
    unknown = sorted(set(settings.only) - GROWTHS.keys())
    if unknown:
        raise SystemExit(f"growth: nothing is called {unknown}; there are {', '.join(GROWTHS)}")
    found = {}
    for name in settings.only:
        found[name] = []
        for size in GROWTHS[name].sizes:
            found[name].append(GROWTHS[name].measure(size))
            print(
                f"{name:16}{size:6}{found[name][-1].seconds:10.3f} s{found[name][-1].bytes / 2**20:10.1f} MiB",
                flush=True,
            )
        print(f"{name:16}exponents: {said(name, found[name])}", flush=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    draw(settings.out / "growth.png", found)
    print(f"written: {settings.out}/growth.png")
    return found


def said(name: str, points: Sequence[Point]) -> str:
    sizes, times, memory = zip(*points, strict=True)
    growth = GROWTHS[name]
    return (
        f"time {exponent(sizes, times)} (arithmetic: {growth.seconds}), "
        f"memory {exponent(sizes, memory)} (arithmetic: {growth.bytes})"
    )


def draw(path: Path, found: dict[str, list[Point]]) -> None:
    """A column a quantity: seconds above, bytes below, both axes logarithmic."""
    figure = Figure(figsize=(3.2 * len(found), 5.5), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
    for (above, below), (name, points) in zip(axes.T, found.items(), strict=True):
        sizes, times, memory = zip(*points, strict=True)
        for place, values, label in ((above, times, "seconds"), (below, np.divide(memory, 2**20), "MiB")):
            place.loglog(sizes, values, "o-")
            place.set_xticks(sizes, map(str, sizes))
            place.xaxis.minorticks_off()
            place.set_title(f"{label}: exponent {exponent(sizes, values)}", fontsize=9)
            place.grid(alpha=0.3)
        below.set_xlabel(name)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Settings))
