"""NES and SPSA: the estimate on linear and quadratic losses, queries, rows, and what they find."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial
from references import assert_inside

import jaxnets as jn
from jaxnets.attacks import estimated
from jaxnets.attacks.estimated import Sampling, estimated_gradient, rademacher
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.queries import with_queries
from jaxnets.attacks.parts.rules import Rule, here

ATTACKS = {"nes": with_queries(estimated.nes), "spsa": with_queries(estimated.spsa)}
every_attack = pytest.mark.parametrize("name", ATTACKS)
DRAWS = {"normal": jax.random.normal, "rademacher": rademacher}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
THREATS = {"Linf": jn.Linf(0.2), "L2": jn.L2(0.8), "L1": jn.L1(2.0)}
KEY = jax.random.key(0)
margin = jn.losses.margin


def linear(weights, offset, x):
    """Class 1 leads class 0 by ``<weights, x> + offset``."""
    lead = jnp.sum(x * weights, axis=range(1, x.ndim)) + offset
    return jnp.stack([jnp.zeros_like(lead), lead], axis=1)


def weights_of(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def images(rows, shape=(3, 4), seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(np.clip(random.uniform(-0.3, 1.3, size=(rows, *shape)), 0, 1), jnp.float32)


def zeros(rows):
    return jnp.zeros(rows, jnp.int32)


# The estimate.


@every_draw
def test_estimate_on_a_linear_model_is_that_of_the_formula_and_has_no_bias(draw, x64):
    """Many rows are many estimates: each is ``mean_i <w, u_i> u_i``, and together they give ``w``."""
    rows, n, samples = 2000, 5, 4
    weights, x = weights_of(n).astype(jnp.float64), jnp.full((rows, n), 0.3)
    settings = Sampling(draw, samples, samples)
    g = estimated_gradient(row_keys(KEY, rows), partial(linear, weights, 0.1), margin, x, zeros(rows), 0.01, settings)
    error = np.asarray(g - weights)
    # E |g - w|^2 = |w|^2 (n + 1) / S for normal directions, |w|^2 (n - 1) / S for signs.
    expected = np.sum(np.square(weights)) * (n + 1 if draw is jax.random.normal else n - 1) / samples
    assert abs(np.mean(np.sum(error**2, axis=1)) / expected - 1) < 0.15
    assert np.sum(error.mean(axis=0) ** 2) < 5 * expected / rows


def test_signs_in_one_dimension_are_exact(x64):
    x = jnp.array([[0.2], [0.7]])
    parabola = lambda x: jnp.concatenate([jnp.zeros_like(x), 3 * x + 5 * (x - 0.2) ** 2], axis=1)  # noqa: E731
    g = estimated_gradient(row_keys(KEY, 2), parabola, margin, x, zeros(2), 0.1, Sampling(rademacher, 1, 1))
    # Even powers cancel between the points of a pair.
    np.testing.assert_allclose(g, [[3.0], [8.0]], atol=1e-9)


def test_more_samples_bring_the_gradient():
    x, weights = images(3, (6,)), weights_of((6, 3))
    logits_fn = lambda x: jnp.sin(x @ weights)  # noqa: E731
    loss = jn.losses.cross_entropy
    exact = jax.grad(lambda x: loss(logits_fn(x), zeros(3)).sum())(x)
    g = estimated_gradient(
        row_keys(KEY, 3), logits_fn, loss, x, zeros(3), 0.01, Sampling(jax.random.normal, 4000, 1000)
    )
    cosine = jnp.sum(g * exact, axis=1) / jnp.linalg.norm(g, axis=1) / jnp.linalg.norm(exact, axis=1)
    assert (cosine > 0.98).all()
    np.testing.assert_allclose(jnp.linalg.norm(g, axis=1) / jnp.linalg.norm(exact, axis=1), 1, atol=0.1)


@pytest.mark.slow
@every_draw
def test_memory_for_fewer_pairs_at_once_does_not_change_the_estimate(draw):
    x, keys, logits_fn = images(3), row_keys(KEY, 3), partial(linear, weights_of((3, 4)), 0.1)
    estimate = partial(estimated_gradient, keys, logits_fn, margin, x, zeros(3), 0.1)
    whole = estimate(Sampling(draw, 12, 12))
    for at_once in (1, 4):
        np.testing.assert_allclose(estimate(Sampling(draw, 12, at_once)), whole, rtol=1e-4, atol=1e-5)
    for row in range(3):
        alone = estimated_gradient(
            keys[row : row + 1], logits_fn, margin, x[row : row + 1], zeros(1), 0.1, Sampling(draw, 12, 12)
        )
        np.testing.assert_allclose(alone[0], whole[row], rtol=1e-4, atol=1e-5)


def test_signs_are_signs_fair_and_independent():
    draws = jax.vmap(lambda key: rademacher(key, (5, 7), jnp.float32))(row_keys(KEY, 3000))
    assert draws.shape == (3000, 5, 7)
    assert set(np.unique(draws)) == {-1, 1}
    flat = np.asarray(draws).reshape(3000, -1)
    correlation = flat.T @ flat / 3000
    assert np.abs(flat.mean(axis=0)).max() < 5 / np.sqrt(3000)
    assert np.abs(correlation - np.eye(35)).max() < 5 / np.sqrt(3000)


def test_both_points_of_a_pair_see_the_same_draw_of_a_random_model():
    """A model that is nothing but noise has no gradient; other pairs see other noise."""
    seen = []

    def noise(key, x):
        u = jax.random.normal(key, (2,))
        jax.debug.callback(lambda u: seen.append(float(u)), u[0])
        return jnp.broadcast_to(u, (len(x), 2))

    model, x = jn.attacks.Stochastic(noise, KEY), images(2)
    g = estimated_gradient(row_keys(KEY, 2), model, margin, x, zeros(2), 0.01, Sampling(rademacher, 6, 3))
    jax.effects_barrier()
    np.testing.assert_array_equal(g, 0)
    assert len(seen) == 24
    assert len(set(seen)) == 12


# Queries.


CALLS = []


def recorded(logits_fn, x):
    """The model, which writes down how many rows it was asked about."""
    jax.debug.callback(lambda _: CALLS.append(len(x)), x[0], ordered=True)
    return logits_fn(x)


def uphill(state, threat, length, gradient, x_t):
    return x_t + length, state


UPHILL = Rule(Partial(lambda x: ()), Partial(here), Partial(uphill))


@every_attack
def test_queries_are_counted(name):
    """A step gains 0.12: the rows need 0, 1, 2, 3 and many steps."""
    short = jnp.array([-0.01, 0.06, 0.18, 0.3, 50.0])
    x = jnp.broadcast_to(-short[:, None] / 6, (5, 6))
    model = Partial(recorded, Partial(linear, jnp.ones(6), 0.0))
    settings = {"threat": jn.Linf(0.4, -60.0, 60.0), "samples": 3, "step_size": 0.02, "rule": UPHILL, "loss": margin}
    for queries, steps in ((8, 1), (14, 1), (15, 2), (36, 5)):
        CALLS.clear()
        result = ATTACKS[name](KEY, model, x, zeros(5), queries=queries, **settings)
        jax.effects_barrier()
        needed = np.minimum([0, 1, 2, 3, steps], steps)
        np.testing.assert_array_equal(result.queries, 1 + 7 * needed)
        np.testing.assert_allclose(result.x, x + 0.02 * needed[:, None], atol=1e-5)
        assert [5] + [30, 5] * steps == CALLS


@every_attack
def test_rows_that_are_fooled_already_cost_one_query_and_are_returned_as_they_are(name):
    x = images(4)
    CALLS.clear()
    model = Partial(recorded, Partial(linear, weights_of((3, 4)), -100.0))
    result = ATTACKS[name](KEY, model, x, zeros(4) + 1, threat=jn.Linf(0.2))
    jax.effects_barrier()
    np.testing.assert_array_equal(result.x, x)
    np.testing.assert_array_equal(result.queries, 1)
    assert CALLS == [4]


# What they find.


@every_attack
@pytest.mark.parametrize("norm", THREATS)
def test_gain_on_a_linear_model(name, norm):
    """Close to epsilon times the dual norm of the weights, the best there is, by the steepest steps of each norm."""
    if name == "spsa" and norm != "Linf":
        pytest.skip("Adam's steps are those of Linf")
    epsilon, shape = 0.5, (8,)
    x, weights = images(5, shape), weights_of(shape)
    threat = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1}[norm](epsilon, -50.0, 50.0)
    settings = {"samples": 32, "queries": 65 * 30 + 1, "sigma": 0.1, "step_size": 0.1, "loss": margin}
    result = ATTACKS[name](KEY, Partial(linear, weights, -1000.0), x, zeros(5), threat=threat, **settings)
    assert_inside(threat, result.x, x)
    gain = np.asarray(result.x - x, np.float64) @ np.asarray(weights)
    best = epsilon * np.linalg.norm(weights, references.dual(references.ORDERS[norm]))
    assert (gain >= 0.97 * best).all()
    assert (gain <= (1 + 1e-5) * best).all()


@every_attack
def test_loss_rises_on_a_network_and_is_the_highest_met(name):
    x, first, second = images(6), weights_of((12, 16)), weights_of((16, 3), seed=2)
    logits_fn = lambda x: jnp.tanh(x.reshape(len(x), -1) @ first) @ second  # noqa: E731
    y, loss = logits_fn(x).argmax(axis=1), jn.losses.cross_entropy
    run = lambda queries: ATTACKS[name](  # noqa: E731
        KEY, logits_fn, x, y, threat=jn.Linf(0.1), queries=queries, samples=10, sigma=0.01, loss=loss, step_size=0.03
    )
    ranks = [
        (margin(logits_fn(z), y) > 0) * 1e3 + loss(logits_fn(z), y)
        for z in (x, *(run(1 + 21 * t).x for t in (1, 3, 8)))
    ]
    for lower, higher in pairwise(ranks):
        assert (higher >= lower).all()
    assert (ranks[-1] > ranks[0] + 0.05).all()


@every_attack
def test_targeted(name):
    x, weights = images(5), weights_of((12, 3))
    logits_fn = Partial(lambda weights, x: (x.reshape(len(x), -1) - 0.5) @ weights, weights)
    wanted = logits_fn(x).argmin(axis=1)
    loss = jn.losses.targeted(jn.losses.cross_entropy)
    settings = {"threat": jn.Linf(0.9), "samples": 20, "queries": 41 * 30 + 1, "step_size": 0.1, "loss": loss}
    result = ATTACKS[name](KEY, logits_fn, x, wanted, **settings)
    np.testing.assert_array_equal(logits_fn(result.x).argmax(axis=1), wanted)
    assert result.queries.min() > 1


# Promises to rows and results.


@pytest.mark.slow
@every_attack
def test_rows_do_not_depend_on_the_batch(name):
    """70 rows, of which most are fooled soon, so that the rest go on in a smaller batch."""
    keys, weights = row_keys(KEY, 70), weights_of(6)
    short = np.where(np.arange(70) % 3 == 0, 50.0, np.linspace(0.01, 0.5, 70))
    x = images(70, (6,))
    x = x - ((x @ weights + short) / jnp.sum(weights**2))[:, None] * weights
    settings = {"threat": jn.L2(3.0, -90.0, 90.0), "samples": 4, "queries": 9 * 6 + 1, "sigma": 0.1, "step_size": 0.1}

    def attack(rows):
        return ATTACKS[name](keys[rows], Partial(linear, weights, 0.0), x[rows], zeros(len(rows)), **settings)

    whole = attack(jnp.arange(70))
    assert 20 < np.sum(np.asarray(whole.queries) == 55) < 35
    for rows in (jnp.arange(70)[::-1], jnp.arange(7)) if name == "nes" else (jnp.arange(7),):
        part = attack(rows)
        np.testing.assert_allclose(part.x, whole.x[rows], atol=1e-3)
        np.testing.assert_array_equal(part.queries, whole.queries[rows])


@every_attack
@pytest.mark.parametrize("norm", THREATS)
def test_results_are_inside_whatever_the_model(name, norm):
    epsilon = THREATS[norm].epsilon * jnp.array([1.0, 0.0, 0.3, 50.0])
    threat, x = type(THREATS[norm])(epsilon), jnp.round(images(4))
    settings = {"threat": threat, "samples": 4, "queries": 40, "step_size": 0.2, "sigma": 0.1, "loss": margin}

    def model(scale, x):
        return scale * linear(weights_of((3, 4)), -100.0, x)

    for scale in (1.0, 0.0, jnp.nan, 1e30, 1e-30):
        result = ATTACKS[name](KEY, Partial(model, scale), x, zeros(4), **settings)
        assert_inside(threat, result.x, x)
        np.testing.assert_array_equal(result.x[1], x[1])
        if scale in (1.0, 1e30, 1e-30):
            assert np.abs(result.x[0] - x[0]).max() > 1e-3


@pytest.mark.slow
@every_attack
def test_double_precision(name, x64):
    x = images(3).astype(jnp.float64)
    settings = {"threat": jn.L2(0.5), "samples": 4, "queries": 40}
    result = ATTACKS[name](KEY, partial(linear, weights_of((3, 4)), -100.0), x, zeros(3), **settings)
    assert result.x.dtype == jnp.float64
    assert_inside(jn.L2(0.5), result.x, x, tolerance=1e-12)


@every_attack
def test_new_budgets_steps_and_epsilons_mean_no_new_trace(name):
    traces = []

    def counted(weights, x):
        traces.append(0)
        return linear(weights, -100.0, x)

    x, attack = images(3), ATTACKS[name]
    attack(KEY, Partial(counted, weights_of((3, 4))), x, zeros(3), threat=jn.Linf(0.2), samples=2, queries=11)
    first = len(traces)
    settings = {"threat": jn.Linf(0.1), "samples": 2, "queries": 16, "sigma": 0.1, "step_size": 0.3}
    other = attack(KEY, Partial(counted, weights_of((3, 4), seed=5)), 1 - x, zeros(3), **settings)
    assert 0 < first == len(traces)
    np.testing.assert_array_equal(other.queries, 16)


@every_attack
def test_bad_arguments_raise(name):
    x, attack = images(3), partial(ATTACKS[name], KEY, partial(linear, 1.0, 0.0), threat=jn.Linf(0.1))
    with pytest.raises(ValueError, match=f"{name} takes at least 12 queries for one step of 5 pairs, got 11"):
        attack(x, zeros(3), samples=5, queries=11)
    for samples, at_once in ((0, 1), (6, 4), (6, 0)):
        with pytest.raises(ValueError, match=f"samples={samples}, at_once={at_once}"):
            attack(x, zeros(3), samples=samples, at_once=at_once)
    with pytest.raises(ValueError, match="step_size must be a scalar"):
        attack(x, zeros(3), step_size=jnp.ones(2))
    with pytest.raises(ValueError, match="B = 3 rows"):
        attack(x, zeros(2))
