"""``python -m benchmarks``: times jaxnets and its peers, and writes what it found."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from benchmarks import limit, report, speed
from benchmarks.process import environment
from benchmarks.sides import SIDES
from benchmarks.work import ON_CPU, ON_GPU, parse


@dataclass(frozen=True)
class Settings:
    """Time jaxnets and its peers on the same work, in turns; write RESULTS.md and its pictures.

    Peers that are not installed are left out: pip install ".[peers]".
    """

    works: tuple[str, ...] = ()
    """What is timed, such as "resnet18_64 train-pgd-10 linf 512 bf16": network, method and steps, norm, rows, and tf32
    or bf16 for less than float32. Unless given, all of the machine's kind."""
    sides: tuple[str, ...] = SIDES
    """Who is timed."""
    rounds: int = 5
    """Calls after the first, which compiles; 0 for that alone."""
    data_dir: Path | None = None
    """Where MNIST is; unless given $JAXNETS_DATA, else the folder of tensorflow-datasets."""
    out: Path | None = None
    """Where RESULTS.md and speed.png are written; unless given benchmarks, on accelerators benchmarks/gpu."""


def main(settings: Settings) -> None:
    """A line a work and side as they are done, and the page so far."""
    unknown = sorted(set(settings.sides) - set(SIDES))
    if unknown or "jaxnets" not in settings.sides:
        raise SystemExit(
            f"benchmarks: --sides takes jaxnets and of its peers {', '.join(SIDES[1:])}; got {settings.sides}"
        )
    if settings.rounds < 0:
        raise SystemExit(f"benchmarks: --rounds takes 0 or more, got {settings.rounds}")
    try:
        works = [parse(work) for work in settings.works]
    except ValueError as error:
        raise SystemExit(f"benchmarks: {error}") from None
    os.environ |= environment()  # of this process too, for it computes beside the sides
    on_cpu = jax.default_backend() == "cpu"
    works = works or (ON_CPU if on_cpu else ON_GPU)
    out = settings.out or Path("benchmarks" if on_cpu else "benchmarks/gpu")
    rates, rows = {work.precision: limit.measured(work.precision) for work in works}, []
    for row in speed.measure(works, settings.sides, rates, rounds=settings.rounds, data_dir=settings.data_dir):
        _tell(row)
        rows.append(row)
        report.write(out, rates, settings.rounds, rows)
    print(f"written: {out}/RESULTS.md, speed.png")


def _tell(row: speed.Row) -> None:
    least = (
        "" if row.limit is None else f"   arithmetic {row.limit.arithmetic:.3f} s, traffic {row.limit.traffic:.3f} s"
    )
    print(f"{row.work}{least}")
    for side, timing in row.sides.items():
        times = (
            f"{row.ratio(side):6.2f}x {timing.median:9.3f} s, first {timing.first:.3f} s, left {timing.survivors:.1%}"
        )
        print(f"    {side:18}{timing.missing or times}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
