"""Eight networks trained together or one after another: which is faster?

A step of adversarial training (PGD-5, batch 64, AdamW) of eight networks: vmapped, in turn within one program, and as
eight calls of the step of one.

Command: ``python -m benchmarks.sweeps``. Two cores of an AMD EPYC, jax 0.10.2; the least and the median milliseconds of
15 rounds::

    network                       vmap           in turn       eight steps
    MLP, 8x8x1                1.9,   2.8        1.9,   2.8        2.6,   3.8
    SmallCNN, 8x8x1          14.7,  17.0       11.3,  12.7       12.3,  14.0
    SmallCNN, 28x28x1       202.6, 224.6       84.7, 102.4       80.3,  97.8

In turn is never slower than together, and compiles once. Not measured on accelerators.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax

import jaxnets as jn
from benchmarks.timing import seconds
from jaxnets.sweeps import in_turn, member, stack, sweep
from jaxnets.types import Batch

MEMBERS = 8
ROWS = 64
ROUNDS = 15

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "MLP, 8x8x1": (jn.models.MLP((128,)), (8, 8, 1)),
    "SmallCNN, 8x8x1": (jn.models.SmallCNN(), (8, 8, 1)),
    "SmallCNN, 28x28x1": (jn.models.SmallCNN(), (28, 28, 1)),
}


def forms(module: nn.Module, shape: tuple[int, ...], rows: int = ROWS) -> dict[str, Callable[[], Any]]:
    """A step of all members, by name."""
    net, optimizer, key = jn.from_linen(module), optax.adamw(1e-3), jax.random.key(0)
    batch = Batch(jax.random.uniform(key, (MEMBERS, rows, *shape)), jax.random.randint(key, (MEMBERS, rows), 0, 10))
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.2), steps=5)
    step = jn.training.make_step(jn.objectives.adversarial(net, attack), optimizer)
    states = stack([
        jn.training.init_state(key, *net.init(key, batch.x[0]), optimizer)
        for key in jax.random.split(key, MEMBERS)
    ])  # fmt: skip
    alone = [(member(states, number), Batch(batch.x[number], batch.y[number])) for number in range(MEMBERS)]
    together, turns = (jax.jit(sweep(lambda _: step, (), over=over)) for over in (jax.vmap, in_turn))
    single = jax.jit(step)
    return {
        "vmap": lambda: together(states, batch),
        "in turn": lambda: turns(states, batch),
        "eight steps": lambda: [single(*one) for one in alone],
    }


def milliseconds(steps: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Of each: the least and the median of interleaved rounds."""
    for step in steps.values():
        jax.block_until_ready(step())
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1000 * seconds(step))
    return {name: (min(found), statistics.median(found)) for name, found in times.items()}


def main() -> None:
    print(f"{'least, median ms':20}" + "".join(f"{name:>18}" for name in ("vmap", "in turn", "eight steps")))
    for name, (module, shape) in CASES.items():
        found = milliseconds(forms(module, shape))
        print(f"{name:20}" + "".join(f"{least:10.1f}, {median:6.1f}" for least, median in found.values()), flush=True)


if __name__ == "__main__":
    main()
