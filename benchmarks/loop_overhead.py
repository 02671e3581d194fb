"""What a compiled attack costs beyond its gradients: the time of PGD-K over K times that of one jitted input gradient.

Command: ``python -m benchmarks.loop_overhead``. Two CPU cores, jax 0.10.2, two runs:

| network                            | one gradient | PGD-10 over 10 gradients |
|------------------------------------|--------------|--------------------------|
| MadryCNN, 28x28x1, batch 128       | 49, 54 ms    | 0.99, 0.95               |
| residual stack, 32x32x16, batch 64 | 30, 30 ms    | 0.97, 1.00               |
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnets as jn
from jaxnets.models.layers import Conv

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


def ratio(
    module: nn.Module, shape: tuple[int, ...], *, steps: int = STEPS, rounds: int = ROUNDS
) -> tuple[float, float]:
    """Medians over interleaved rounds: milliseconds of one gradient, and the ratio of PGD to ``steps`` of them."""
    net = jn.from_linen(module)
    data_key, init_key, attack_key = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.uniform(data_key, shape), jnp.arange(shape[0]) % 10
    model = net.logits_fn(*net.init(init_key, x))

    @jax.jit
    def gradient(x):
        return jax.grad(lambda z: jnp.sum(jn.losses.cross_entropy(model(z), y)))(x)

    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=steps)
    calls: list[Callable[[], jax.Array]] = [lambda: gradient(x), lambda: attack(attack_key, model, x, y)]
    for call in calls:
        call().block_until_ready()
    one, many = zip(*[(_seconds(calls[0]), _seconds(calls[1])) for _ in range(rounds)], strict=True)
    single = statistics.median(one)
    return 1000 * single, statistics.median(many) / (steps * single)


def _seconds(call: Callable[[], jax.Array]) -> float:
    began = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - began


def main() -> None:
    print(f"{'network':36} {'gradient':>12} {f'PGD-{STEPS} / {STEPS} gradients':>24}")
    for name, (module, shape) in CASES.items():
        milliseconds, relative = ratio(module, shape)
        print(f"{name:36} {milliseconds:9.1f} ms {relative:24.2f}")


if __name__ == "__main__":
    main()
