"""TRADES: what its attack is given, where that starts, and that it raises the divergence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import jaxnets as jn
from jaxnets.types import Batch

KEY = jax.random.key(0)
THREAT = jn.Linf(0.1)


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    batch = Batch(jnp.asarray(random.uniform(0.2, 0.8, (6, 4)), jnp.float32), jnp.array([0, 2, 1, 1, 0, 2]))
    net = jn.from_linen(jn.models.MLP((8,), 3, jnp.tanh))
    return net, *net.init(KEY, batch.x), batch


def test_attack_is_given_the_divergence_and_the_clean_prediction(problem):
    net, params, stats, batch = problem
    seen = {}

    def watching(key, logits_fn, x, target, **options):
        seen.update(options, target=target, x=x)
        return x

    jn.objectives.trades(net, partial(watching, loss=jn.losses.margin))(params, stats, batch, KEY)
    assert seen["loss"] is jn.losses.kl
    np.testing.assert_array_equal(seen["target"], net.infer(params, stats, batch.x))
    np.testing.assert_array_equal(seen["x"], batch.x)


def divergences(model, x_adv, x):
    logits, reference = np.asarray(model(x_adv)), np.asarray(model(x))
    return np.array([references.kl(*row) for row in zip(logits, reference, strict=True)])


def test_attack_from_beside_the_clean_rows_raises_the_divergence(problem):
    """At the clean rows the divergence has no gradient: a start there is one that never moves, but for rounding."""
    net, params, stats, batch = problem
    model, start = net.logits_fn(params, stats), jn.attacks.gaussian()
    attack = partial(jn.attacks.pgd, threat=THREAT, steps=10, step_size=0.025, start=start)
    inner_key, _ = jax.random.split(KEY)
    x_adv = jn.objectives.trades(net, attack).inner(params, stats, batch, inner_key)
    references.assert_inside(THREAT, x_adv, batch.x)
    assert (divergences(model, x_adv, batch.x) > 100 * divergences(model, batch.x + 0.001, batch.x)).all()
    one_step = partial(jn.attacks.fgsm, threat=THREAT, start=start)
    from_beside = jn.objectives.trades(net, one_step).inner(params, stats, batch, inner_key)
    assert (divergences(model, from_beside, batch.x) > 0.2 * divergences(model, x_adv, batch.x)).all()
    gradient = jax.grad(lambda x: jn.losses.kl(model(x), model(batch.x)).sum())(batch.x)
    assert np.abs(gradient).max() < 1e-6


def test_gaussian_start():
    """Mean and deviation; outside the box; a row's noise does not depend on the others."""
    x = jnp.full((4, 5000), 0.5)
    keys = jax.random.split(KEY, 4)
    noise = np.asarray(jn.attacks.gaussian(2.0)(keys, THREAT, x) - x, np.float64)
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=0.1)
    np.testing.assert_allclose(noise.std(axis=1), 2, rtol=0.05)
    np.testing.assert_array_equal(jn.attacks.gaussian(2.0)(keys[2:], THREAT, x[2:]) - x[2:], noise[2:])
    assert jn.attacks.gaussian(2.0)(keys, THREAT, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_another_sigma_is_not_another_program(problem):
    net, params, stats, batch = problem
    traces = []

    def model(x):
        traces.append(0)
        return net.infer(params, stats, x)

    for sigma in (0.001, 0.002):
        start = jn.attacks.gaussian(sigma)
        jn.attacks.fgsm(KEY, jax.tree_util.Partial(model), *batch, threat=THREAT, start=start)
    assert len(traces) == 1
