"""Attacks that count what they ask of the model, row by row."""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

from jaxnets.types import Array, Attack

_COUNTING = "_counting_queries"


class Queried(NamedTuple):
    """``x[B, ...]`` and how many queries each row has cost, ``queries[B]``, integers."""

    x: Array
    queries: Array


def counts_queries(attack: Callable[..., Queried]) -> Callable[..., Array]:
    """Makes an attack of a function that returns `Queried`; `with_queries` undoes it."""

    @wraps(attack)
    def without_count(*arguments, **options):
        return attack(*arguments, **options).x

    # Not `__wrapped__`, which `jax.jit` sets too. With the function whose it is: `functools.wraps` copies what is here.
    setattr(without_count, _COUNTING, (without_count, attack))
    return without_count


def with_queries(attack: Attack) -> Callable[..., Queried] | None:
    """The same attack, returning `Queried`; None where it does not count.

    >>> from jaxnets import attacks
    >>> with_queries(attacks.pgd) is None
    True
    """
    function, options = (attack.func, attack.keywords) if isinstance(attack, partial) else (attack, {})
    counted, counting = getattr(function, _COUNTING, (None, None))
    return partial(counting, **options) if counting and counted is function else None
