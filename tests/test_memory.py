"""An attack holds a few images a row, however many steps it takes."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxnets as jn

LOOPS = {
    "pgd": lambda n: partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=n),
    "adam_pgd": lambda n: partial(jn.attacks.adam_pgd, threat=jn.L2(0.1), steps=n),
    "apgd": lambda n: partial(jn.attacks.apgd, threat=jn.L1(0.9), steps=n),
    "apgd_targeted": lambda n: partial(jn.attacks.apgd_targeted, threat=jn.Linf(0.1), steps=n, classes=2),
    "restarts": lambda n: jn.attacks.restarts(partial(jn.attacks.fgsm, threat=jn.L2(1.0), start=jn.attacks.uniform), n),
    "fab": lambda n: partial(jn.attacks.fab, threat=jn.L2(1.0), steps=n),
    "carlini_wagner": lambda n: partial(jn.attacks.carlini_wagner, threat=jn.L2(1.0), steps=n, rounds=3),
    "deepfool": lambda n: partial(jn.attacks.deepfool, threat=jn.L2(1.0), steps=n),
    "ead": lambda n: partial(jn.attacks.ead, threat=jn.L1(9.0), steps=n, rounds=3),
    "lbfgs": lambda n: partial(jn.attacks.lbfgs, threat=jn.L2(1.0), steps=n, rounds=3),
    "jsma": lambda n: partial(jn.attacks.jsma, threat=jn.L0(n)),
    "sigma_zero": lambda n: partial(jn.attacks.sigma_zero, threat=jn.L0(9), steps=n),
    "ddn": lambda n: partial(jn.attacks.ddn, threat=jn.L2(1.0), steps=n),
    "fmn": lambda n: partial(jn.attacks.fmn, threat=jn.Linf(1.0), steps=n),
    "square": lambda n: partial(jn.attacks.square, threat=jn.Linf(0.1), queries=n),
    "nes": lambda n: partial(jn.attacks.nes, threat=jn.Linf(0.1), queries=n + 1, samples=4),
    "spsa": lambda n: partial(jn.attacks.spsa, threat=jn.Linf(0.1), queries=n + 1, samples=4, step_size=0.01),
}

QUICK = ("pgd", "apgd", "fab", "square")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOOPS]
)
def test_memory_does_not_grow_with_the_steps(name):
    net = jn.from_linen(jn.models.MLP((8,), 4))
    x, y = jnp.full((6, 16, 16, 3), 0.5), jnp.zeros(6, jnp.int32)
    logits_fn = net.logits_fn(*net.init(jax.random.key(0), x))

    def bytes_held(steps):
        program = jax.jit(LOOPS[name](steps)).lower(jax.random.key(1), logits_fn, x, y).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = bytes_held(20), bytes_held(2000)
    assert few > x.nbytes
    # The lengths of 2,000 steps are 8 kB; an image a step would be 24 MB.
    assert many - few < 20_000
