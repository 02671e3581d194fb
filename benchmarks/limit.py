"""The least time that work could take: its operations over the machine's rate, its bytes over the bandwidth."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

import jaxnets as jn
from benchmarks.networks import Loaded
from benchmarks.timing import seconds
from benchmarks.work import Precision, Work
from jaxnets.types import Batch


class Rates(NamedTuple):
    """What the machine does at best: floating-point operations and bytes a second."""

    flops: float
    bytes: float


class Seconds(NamedTuple):
    """The least that operations take, and the least that bytes take which go to memory; those in caches take less."""

    arithmetic: float
    traffic: float


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written."""

    flops: float
    bytes: float

    def times(self, count: int) -> "Cost":
        return Cost(count * self.flops, count * self.bytes)

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rates: Rates) -> "Seconds":
        return Seconds(self.flops / rates.flops, self.bytes / rates.bytes)


def cost(function: Callable[..., Any], *arguments: Any) -> Cost:
    """Of one call by XLA's cost analysis: operations as they are written, bytes as they are compiled.

    Operations are those of the layers' plain forms: the forms for CPUs multiply by zeros. Loops are counted as one
    round of their body: give this a function without.

    >>> square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    >>> cost(jnp.dot, square, square).flops == 2 * 64**3
    True
    """

    def lowered():
        # As a new function, or JAX gives what it has of this one.
        return jax.jit(lambda *arguments: function(*arguments)).lower(*arguments)

    # XLA does not know what oneDNN does.
    with mock.patch("jaxnets.cpu.by_onednn", return_value=False):
        compiled = lowered().compile().cost_analysis()
        with mock.patch("jax.default_backend", return_value="any"):
            written = lowered().cost_analysis()
    return Cost(written["flops"], compiled["bytes accessed"])  # pyright: ignore


def of_work(work: Work, loaded: Loaded) -> Cost | None:
    """The gradients and forward passes of the work, and nothing besides; None where their number is not fixed."""
    if not (work.steps or work.trains):
        return None
    x, y, model = jnp.asarray(loaded.x), jnp.asarray(loaded.y), loaded.model
    if work.method == "square":
        return cost(model, x).times(work.steps)
    by_input = cost(jax.grad(lambda x: jnp.sum(jn.losses.cross_entropy(model(x), y))), x)
    if work.method == "train-trades":
        trades = jn.objectives.trades(loaded.net, lambda key, model, x, y, **settings: x)
        return by_input.times(work.steps).plus(_of_objective(trades, loaded))
    if work.trains:
        steps = work.steps or 1
        return by_input.times(steps).plus(_of_objective(jn.objectives.standard(loaded.net), loaded))
    return by_input.times(work.steps)


def _of_objective(objective: Any, loaded: Loaded) -> Cost:
    batch = Batch(jnp.asarray(loaded.x), jnp.asarray(loaded.y))
    gradient = jax.value_and_grad(objective, has_aux=True)
    return cost(gradient, loaded.params, loaded.stats, batch, jax.random.key(0))


def measured(precision: Precision, rounds: int = 10) -> Rates:
    """The best of some products of square matrices, 2048 wide or on GPUs 8192, and of some sums of long arrays."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    # Random numbers, for GPUs multiply others faster.
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16 if precision == "bf16" else jnp.float32)
    long = jnp.ones(1 << 26, jnp.float32)
    multiply = partial(jnp.dot, precision="tensorfloat32" if precision == "tf32" else "float32")
    product = _best(jax.jit(multiply), matrix, matrix, rounds=rounds)
    total = _best(jax.jit(jnp.add), long, long, rounds=rounds)
    return Rates(2 * side**3 / product, 3 * long.nbytes / total)


def _best(function: Callable[..., Any], *arguments: Any, rounds: int) -> float:
    # The first compiles, and is never the best.
    return min(seconds(partial(function, *arguments)) for _ in range(1 + rounds))
