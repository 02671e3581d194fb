"""All sides on the same work, in turns: medians with their spread, beside the least time that the work could take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import limit, networks
from benchmarks.process import Answer, Side
from benchmarks.work import Precision, Work


class Timing(NamedTuple):
    """Of one side on one work.

    Attributes:
      first: seconds of the first call, which compiles.
      median, least, most: seconds of the later ones, or of the first where it is the only one.
      survivors: the share of rows right after the first call's attack; NaN for training.
      missing: why there are none of these; empty otherwise.
    """

    first: float
    median: float
    least: float
    most: float
    survivors: float
    missing: str


class Row(NamedTuple):
    """All sides on one work, and its ``limit``; None where the arithmetic of the work is not fixed."""

    work: Work
    limit: limit.Seconds | None
    sides: dict[str, Timing]

    def ratio(self, side: str) -> float:
        """How many times as long as jaxnets a side takes, first calls apart."""
        return self.sides[side].median / self.sides["jaxnets"].median


def measure(
    works: Sequence[Work],
    sides: Sequence[str],
    rates: Mapping[Precision, limit.Rates],
    *,
    rounds: int,
    data_dir: Path | None = None,
) -> Iterator[Row]:
    """Each work by each side: one call that compiles, then ``rounds`` in turns."""
    # First, for what cannot be done should show before hours of what can.
    limits = [_limit(work, rates[work.precision], data_dir) for work in works]
    started = {name: Side(name, data_dir=data_dir) for name in sides}
    try:
        for work, least in zip(works, limits, strict=True):
            yield Row(work, least, in_turns(work, started, rounds))
    finally:
        for side in started.values():
            side.close()


def in_turns(work: Work, sides: Mapping[str, Side], rounds: int) -> dict[str, Timing]:
    """One work by each side: one call that compiles, then ``rounds`` in turns."""
    answers = [[side.ask(work) for side in sides.values()] for _ in range(1 + rounds)]
    return {name: timing(found) for name, found in zip(sides, zip(*answers, strict=True), strict=True)}


def _limit(work: Work, rates: limit.Rates, data_dir: Path | None) -> limit.Seconds | None:
    cost = limit.of_work(work, networks.load(work.network, data_dir=data_dir, rows=work.rows, precision=work.precision))
    return cost.seconds(rates) if cost else None


def timing(answers: Iterable[Answer]) -> Timing:
    """Of one side on one work, from what it answered."""
    first, *later = answers
    seconds = [answer.seconds for answer in later or [first]]
    missing = next((answer.missing for answer in (first, *later) if answer.missing), "")
    return Timing(first.seconds, float(np.median(seconds)), min(seconds), max(seconds), first.survivors, missing)
