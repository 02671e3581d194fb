"""What compiled attacks and adversarial steps cost beyond their gradients.

The time of PGD-K over that of K jitted input gradients; that of a step of adversarial training against PGD-K over that
of K input gradients and one parameter gradient.

Command: ``python -m benchmarks.loop_overhead``. Two CPU cores, jax 0.10.2:

| network                            | one input gradient | PGD-10 | one parameter gradient | step with PGD-10 |
|------------------------------------|--------------------|--------|------------------------|------------------|
| MadryCNN, 28x28x1, batch 128       | 51 ms              | 1.07   | 108 ms                 | 1.06             |
| residual stack, 32x32x16, batch 64 | 45 ms              | 1.00   | 90 ms                  | 0.99             |

Where other work shared the cores, two runs gave 1.12 and 0.98 for the first step, 1.10 and 1.05 for the second.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxnets as jn
from benchmarks.timing import seconds
from jaxnets.models.layers import Conv
from jaxnets.types import Batch

STEPS = 10
ROUNDS = 15


class ResidualStack(nn.Module):
    """Three residual blocks of two 3x3 convolutions with 16 channels, then the mean and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = x + Conv(16, (3, 3))(nn.relu(Conv(16, (3, 3))(nn.relu(x))))
        return nn.Dense(10)(jnp.mean(nn.relu(x), axis=(1, 2)))


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "MadryCNN, 28x28x1, batch 128": (jn.models.MadryCNN(), (128, 28, 28, 1)),
    "residual stack, 32x32x16, batch 64": (ResidualStack(), (64, 32, 32, 16)),
}


class Overhead(NamedTuple):
    """Medians over interleaved rounds.

    Attributes:
      by_input, by_params: milliseconds of one gradient.
      attack: of PGD, over ``steps`` input gradients.
      step: of adversarial training, over ``steps`` input gradients and one parameter gradient.
    """

    by_input: float
    by_params: float
    attack: float
    step: float


def overhead(module: nn.Module, shape: tuple[int, ...], *, steps: int = STEPS, rounds: int = ROUNDS) -> Overhead:
    """Times the gradients, the attack and the step in turns."""
    net = jn.from_linen(module)
    data_key, init_key, attack_key = jax.random.split(jax.random.key(0), 3)
    batch = Batch(jax.random.uniform(data_key, shape), jnp.arange(shape[0]) % 10)
    params, stats = net.init(init_key, batch.x)
    model, optimizer = net.logits_fn(params, stats), optax.sgd(0.1)
    state = jn.training.init_state(attack_key, params, stats, optimizer)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=steps)
    by_input = jax.jit(jax.grad(lambda x: jnp.sum(jn.losses.cross_entropy(model(x), batch.y))))
    by_params = jax.jit(jax.value_and_grad(jn.objectives.standard(net), has_aux=True))
    step = jax.jit(jn.training.make_step(jn.objectives.adversarial(net, attack), optimizer))
    calls: list[Callable[[], Any]] = [
        lambda: by_input(batch.x),
        lambda: by_params(params, stats, batch, attack_key),
        lambda: attack(attack_key, model, *batch),
        lambda: step(state, batch),
    ]
    for call in calls:
        jax.block_until_ready(call())
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    one, other, attacked, stepped = map(statistics.median, zip(*times, strict=True))
    return Overhead(1000 * one, 1000 * other, attacked / (steps * one), stepped / (steps * one + other))


def main() -> None:
    print(f"{'network':36} {'by input':>10} {'by params':>10} {f'PGD-{STEPS}':>8} {'step':>8}")
    for name, (module, shape) in CASES.items():
        found = overhead(module, shape)
        print(
            f"{name:36} {found.by_input:7.1f} ms {found.by_params:7.1f} ms {found.attack:8.2f} {found.step:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
