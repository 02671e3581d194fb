"""Averages of weights against plain loops in numpy, and the statistics that go with them (trap 19)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets.averaging import ema, init_average, statistics_of, swa, with_average
from jaxnets.training import init_state, make_step
from jaxnets.types import Batch

RATE = optax.sgd(0.1)


@pytest.fixture(scope="module")
def net():
    class Small(nn.Module):
        """With two batch norms of unlike momentum, the second behind the first."""

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(not train, momentum=0.9)(nn.Dense(4)(x))
            x = nn.BatchNorm(not train, momentum=0.5)(nn.Dense(5)(jax.nn.relu(x)))
            return nn.Dense(3)(x)

    return jn.from_linen(Small())


class OneNorm(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(not train, momentum=self.momentum)(x)


def batches(count, rows=8):
    rng = np.random.default_rng(0)
    return [
        Batch(jnp.asarray(rng.normal(size=(rows, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, rows)))
        for _ in range(count)
    ]


def trajectory(net, average, steps=7):
    """The states after each step."""
    key = jax.random.key(0)
    step = jax.jit(with_average(make_step(jn.objectives.standard(net), RATE), average))
    state = init_average(init_state(key, *net.init(key, jnp.ones((2, 6))), RATE))
    states = [state]
    for batch in batches(steps):
        states.append(step(states[-1], batch)[0])
    return states


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)


@pytest.mark.parametrize("warm_up", [1.0, 10.0])
def test_ema_of_parameters_and_statistics(net, warm_up):
    states = trajectory(net, ema(0.8, warm_up=warm_up))
    expected = flat((states[0].params, states[0].stats))
    for step, state in enumerate(states[1:], 1):
        decay = min(0.8, (1 + step) / (warm_up + step))
        expected = decay * expected + (1 - decay) * flat((state.params, state.stats))
        np.testing.assert_allclose(flat(state.averaged), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(flat(states[-1].averaged) - flat((states[-1].params, states[-1].stats))).max() > 1e-2


@pytest.mark.parametrize(("start", "every"), [(1, 1), (3, 1), (2, 3)])
def test_swa_is_the_mean_of_the_steps_that_count(net, start, every):
    states = trajectory(net, swa(start, every=every))
    for step, state in enumerate(states[1:], 1):
        counted = [step] if step < start else range(start, step + 1, every)
        expected = np.mean([flat((states[k].params, states[k].stats)) for k in counted], axis=0)
        np.testing.assert_allclose(flat(state.averaged), expected, rtol=1e-5, atol=1e-6)


def test_the_average_changes_nothing_in_training(net):
    key = jax.random.key(0)
    step = jax.jit(make_step(jn.objectives.standard(net), RATE))
    state = init_state(key, *net.init(key, jnp.ones((2, 6))), RATE)
    for batch in batches(7):
        state = step(state, batch)[0]
    averaged = trajectory(net, ema(0.8))[-1]
    np.testing.assert_allclose(flat(averaged.params), flat(state.params), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(averaged.stats), flat(state.stats), rtol=1e-5, atol=1e-6)


def test_averages_of_whole_numbers_are_the_last():
    average = ema(0.5)
    assert average(jnp.array(3), (jnp.array(1), jnp.ones(2)), (jnp.array(5), jnp.zeros(2)))[0] == 5


@pytest.mark.parametrize("average", [ema(0.999, warm_up=1), swa(1)])
def test_averages_of_weights_in_half_precision_go_on(average):
    """Kept as they are, 1 + 0.001 would be 1 again and again."""
    state = init_average(init_state(jax.random.key(0), jnp.ones(2, jnp.bfloat16), {}, RATE))
    move = jax.jit(lambda step, averaged: average(step, averaged, (jnp.full(2, 2, jnp.bfloat16), {})))
    averaged = state.averaged
    for step in range(2, 3000):
        averaged = move(step, averaged)
    assert averaged[0].dtype == jnp.float32
    assert (averaged[0] > 1.9).all()


@pytest.mark.parametrize("before", [1e8, np.inf, np.nan])
def test_before_the_mean_begins_the_average_is_the_current_weight(before):
    assert swa(10)(jnp.array(1), jnp.float32(before), jnp.float32(1)) == 1


def test_statistics_of_weights_are_the_means_over_the_batches(net):
    key = jax.random.key(1)
    params, stats = net.init(key, jnp.ones((2, 6)))
    seen = batches(3)
    found = statistics_of(net, params, stats, seen, key=key)["batch_stats"]
    means, variances = [], []
    first, second = params["Dense_0"], params["Dense_1"]
    for batch in seen:
        hidden = np.asarray(batch.x, float) @ np.asarray(first["kernel"], float) + first["bias"]
        means.append(hidden.mean(0))
        variances.append(hidden.var(0))
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], np.mean(means, 0), atol=1e-5)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], np.mean(variances, 0), rtol=1e-4)
    normal = [  # each batch is normalised by its own statistics
        np.maximum((np.asarray(b.x, float) @ np.asarray(first["kernel"]) + first["bias"] - m) / np.sqrt(v + 1e-5), 0)
        for b, m, v in zip(seen, means, variances, strict=True)
    ]
    deeper = np.mean([(h @ np.asarray(second["kernel"], float) + second["bias"]).mean(0) for h in normal], axis=0)
    np.testing.assert_allclose(found["BatchNorm_1"]["mean"], deeper, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_statistics_of_any_size_keep_their_digits(scale, momentum):
    net = jn.from_linen(OneNorm(momentum))
    x = scale * jax.random.normal(jax.random.key(0), (64, 3)) + scale
    params, stats = net.init(jax.random.key(1), x)
    found = statistics_of(net, params, stats, [Batch(x, jnp.zeros(64, int))], key=jax.random.key(2))["batch_stats"]
    exact = np.asarray(x, float)
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], exact.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], exact.var(0), rtol=1e-4)


def test_networks_without_statistics_have_none():
    net = jn.from_linen(jn.models.MLP(()))
    params, stats = net.init(jax.random.key(0), jnp.ones((2, 6)))
    assert statistics_of(net, params, stats, batches(1), key=jax.random.key(0)) == {}


def test_impossible_settings_are_refused(net):
    with pytest.raises(ValueError, match=r"got 1\.0 and 10\.0"):
        ema(1.0)
    with pytest.raises(ValueError, match=r"got 0\.9 and 0\.5"):
        ema(0.9, warm_up=0.5)
    with pytest.raises(ValueError, match="got 0 and 1"):
        swa(0)
    with pytest.raises(ValueError, match="at least one batch"):
        statistics_of(net, {}, {}, [], key=jax.random.key(0))


def test_a_state_without_an_average_is_refused(net):
    key = jax.random.key(0)
    step = with_average(make_step(jn.objectives.standard(net), RATE), ema())
    with pytest.raises(ValueError, match=r"start training from averaging\.init_average"):
        step(init_state(key, *net.init(key, jnp.ones((2, 6))), RATE), batches(1)[0])
