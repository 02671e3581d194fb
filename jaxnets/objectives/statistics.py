"""Which batch moves the batch statistics in an objective that knows two: `clean`, `attacked` or `both`.

A batch in training is normalised by its own mean and variance, whichever rule is chosen; the rule says which batch the
averages follow by which inference normalises, and with it every attack and evaluation.
"""

from collections.abc import Callable
from typing import Any

from jaxnets.classifier import Classifier
from jaxnets.objectives.standard import passed
from jaxnets.types import Array, Params, Stats

Pass = Callable[[Stats], tuple[Any, Stats]]
"""``stats -> (result, stats)``: one batch through the network in training."""
MovedBy = Callable[[Pass, Pass, Stats], tuple[Any, Any, Stats]]
"""``(clean pass, attacked pass, stats) -> (result of the first, result of the second, stats)``."""


def clean(on_clean: Pass, on_attacked: Pass, stats: Stats) -> tuple[Any, Any, Stats]:
    """The clean batch alone.

    >>> counting = lambda seen: (seen, seen + 1)
    >>> clean(counting, counting, 0)
    (0, 0, 1)
    """
    of_clean, moved = on_clean(stats)
    of_attacked, _ = on_attacked(stats)
    return of_clean, of_attacked, moved


def attacked(on_clean: Pass, on_attacked: Pass, stats: Stats) -> tuple[Any, Any, Stats]:
    """The attacked batch alone; a clean pass of which no more is used is left out of the compiled program.

    >>> attacked(lambda seen: (seen, seen + 1), lambda seen: (seen, seen + 5), 0)
    (0, 0, 5)
    """
    of_clean, _ = on_clean(stats)
    of_attacked, moved = on_attacked(stats)
    return of_clean, of_attacked, moved


def both(on_clean: Pass, on_attacked: Pass, stats: Stats) -> tuple[Any, Any, Stats]:
    """The clean batch, then the attacked one.

    >>> both(lambda seen: (seen, seen + 1), lambda seen: (seen, seen + 5), 0)
    (0, 1, 6)
    """
    of_clean, stats = on_clean(stats)
    of_attacked, stats = on_attacked(stats)
    return of_clean, of_attacked, stats


def passes(
    net: Classifier, params: Params, stats: Stats, x: Array, x_adv: Array, key: Array, *, moved_by: MovedBy
) -> tuple[Array, Array, Stats]:
    """The logits ``[B, K]`` of clean and of attacked rows in training, and the statistics after both passes.

    Dropout leaves out the same units in both: what differs is the perturbation alone.
    """

    def through(rows: Array) -> Pass:
        return lambda stats: passed(net, params, stats, rows, key)

    return moved_by(through(x), through(x_adv), stats)
