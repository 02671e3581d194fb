"""What compiled programs cost by XLA's own count, kept: a fifth more, or a fifth less, does not go unseen.

Counts and no times: they are the same on every machine. A loop counts as one round. Where a change is meant, so is the
new number.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxnets as jn
from jaxnets.types import Batch

KEY = jax.random.key(0)
THREAT = jn.Linf(0.1)


def on_small_cnn(attack):
    """The program of an attack on eight rows."""
    net, x, y = jn.from_linen(jn.models.SmallCNN()), jnp.full((8, 28, 28, 1), 0.5), jnp.arange(8)
    model = jax.tree_util.Partial(net.logits_fn(*net.init(KEY, x)))
    return jax.jit(attack).lower(KEY, model, x, y)


def training(module, shape, objective_of):
    """The program of a step of training."""
    net, batch = jn.from_linen(module), Batch(jnp.full(shape, 0.5), jnp.arange(shape[0]) % 10)
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: jn.training.init_state(KEY, *net.init(KEY, batch.x), optimizer))
    return jax.jit(jn.training.make_step(objective_of(net), optimizer)).lower(state, batch)


PGD = partial(jn.attacks.pgd, threat=THREAT, steps=5)
RESNET = jn.models.cifar_resnet(8, width=8)
PROGRAMS = {
    "pgd": lambda: on_small_cnn(PGD),
    "carlini_wagner": lambda: on_small_cnn(
        partial(jn.attacks.carlini_wagner, threat=jn.L2(jnp.inf), steps=5, rounds=1)
    ),
    "square": lambda: on_small_cnn(partial(jn.attacks.square, threat=THREAT, queries=5)),
    "adversarial": lambda: training(
        jn.models.MadryCNN(), (8, 28, 28, 1), lambda net: jn.objectives.adversarial(net, PGD)
    ),
    "trades": lambda: training(RESNET, (4, 32, 32, 3), lambda net: jn.objectives.trades(net, PGD)),
}
COSTS = {
    "pgd": (28.2, 5.74, 913),
    "carlini_wagner": (37.2, 9.18, 2468),
    "square": (18.1, 3.95, 1828),
    "adversarial": (1198, 196, 1867),
    "trades": (369.2, 57.5, 6245),
}
"""Millions of operations and of bytes, instructions."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_costs_what_it_did(name):
    program = PROGRAMS[name]().compile()
    cost, instructions = program.cost_analysis(), len(re.findall(r"^\s+\S+ = ", program.as_text(), re.MULTILINE))
    found = cost["flops"] / 1e6, cost["bytes accessed"] / 1e6, instructions
    for value, kept in zip(found, COSTS[name], strict=True):
        assert value == pytest.approx(kept, rel=0.19), f"{name} costs {found}, it cost {COSTS[name]}"
