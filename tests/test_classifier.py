"""The bridge from Flax: named activations, and the layer that normalises."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets import models

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def network():
    """A residual network with statistics that are not those of its beginning, and images."""
    net = jn.from_linen(models.ResNet((1, 1), models.resnet.BasicBlock, 5, 4, models.cifar_stem))
    x = jax.random.uniform(KEY, (6, 8, 8, 3))
    params, stats = net.init(KEY, x)
    return net, params, net.train(params, stats, x, KEY)[1], x


def test_activations_are_those_of_the_layers(network):
    net, params, stats, x = network
    logits, same, seen = net.activations(params, stats, x)
    np.testing.assert_array_equal(logits, net.infer(params, stats, x))
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    np.testing.assert_array_equal(seen["fc"], logits)
    # The last layer once more, by hand, from the block before it.
    pooled = seen["layer2_0"].mean(axis=(1, 2))
    np.testing.assert_allclose(pooled @ params["fc"]["kernel"] + params["fc"]["bias"], logits, rtol=1e-5, atol=1e-6)
    for name in ("conv1", "bn1", "layer1_0", "layer1_0/conv2", "layer2_0/downsample"):
        assert name in seen
    assert seen["layer2_0"].shape == (6, 4, 4, 8)


def test_activations_with_a_key_are_those_of_training(network):
    net, params, stats, x = network
    logits, moved, seen = net.activations(params, stats, x, KEY)
    expected, after = net.train(params, stats, x, KEY)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, moved, after)
    normal = (seen["bn1"] - params["bn1"]["bias"]) / params["bn1"]["scale"]
    np.testing.assert_allclose(normal.mean(axis=(0, 1, 2)), 0, atol=1e-5)


def test_activations_that_nobody_uses_are_not_computed():
    net = jn.from_linen(models.GoogLeNet.small(width=1 / 16))
    x = jnp.zeros((1, 32, 32, 3))
    params, stats = jax.eval_shape(net.init, KEY, x)
    with_heads = jax.jit(lambda *a: [net.activations(*a)[2][name] for name in ("aux1", "fc")])
    without, infer = jax.jit(lambda *a: net.activations(*a)[2]["fc"]), jax.jit(net.infer)
    flops = [f.lower(params, stats, x).compile().cost_analysis()["flops"] for f in (with_heads, without, infer)]
    assert flops[0] > flops[1] == flops[2]


def test_every_call_of_a_shared_layer_has_a_name():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3, name="dense")
            return dense(dense(x))

    net = jn.from_linen(Twice())
    params, stats = net.init(KEY, jnp.ones((2, 3)))
    logits, _, seen = net.activations(params, stats, jnp.ones((2, 3)))
    assert sorted(seen) == ["dense", "dense#1"]
    np.testing.assert_array_equal(seen["dense#1"], logits)


def test_normalized_is_the_network_on_normalised_images(network):
    net, params, stats, x = network
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    behind = jn.normalized(net, mean, std)
    z = ((x - mean.astype(np.float32)) / std.astype(np.float32)).astype(np.float32)
    np.testing.assert_array_equal(behind.infer(params, stats, x), net.infer(params, stats, z))
    for found, expected in zip(behind.train(params, stats, x, KEY), net.train(params, stats, z, KEY), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    for key in (None, KEY):
        found, expected = behind.activations(params, stats, x, key), net.activations(params, stats, z, key)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, behind.init(KEY, x), net.init(KEY, z))


def test_attacks_stay_in_the_units_of_the_data(network):
    net, params, stats, x = network
    model = jn.normalized(net, 0.5, 0.25).logits_fn(params, stats)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=3)
    x_adv = attack(KEY, model, x, jnp.zeros(len(x), int))
    assert 0.05 < float(jnp.abs(x_adv - x).max()) <= 0.1 + 1e-6
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1


def test_normalized_refuses_deviations_of_zero(network):
    with pytest.raises(ValueError, match=r"above 0, got \[0.2, 0.0\]"):
        jn.normalized(network[0], 0.5, [0.2, 0])


def test_normalized_refuses_bytes(network):
    net, params, stats, x = network
    with pytest.raises(ValueError, match="must be floats before they are normalised, got uint8"):
        jn.normalized(net, 0.5, 0.25).infer(params, stats, (255 * x).astype(jnp.uint8))


def test_equal_networks_share_their_programs():
    traces, x = [], jnp.ones((2, 3))

    @jax.jit
    def logits(model, x):
        traces.append(0)
        return model(x)

    def asked(mean, std=0.5, hidden=(4,), seed=0):
        net = jn.normalized(jn.from_linen(models.MLP(hidden)), mean, std)
        model = net.logits_fn(*net.init(jax.random.key(seed), x))
        np.testing.assert_allclose(logits(model, x), model(x), rtol=1e-6)
        return len(traces)

    assert asked(0.1) == asked(0.1, seed=1) == 1
    assert asked([0.1, 0.2, 0.3]) == asked(np.array([0.1, 0.2, 0.3]), seed=1) == 2
    assert [asked([0.1] * 3), asked(0.1, std=0.25), asked(0.1, hidden=(5,))] == [3, 4, 5]


def test_modules_without_a_hash_are_networks_too():
    net = jn.from_linen(nn.Sequential([nn.Dense(3), nn.relu]))
    assert net.infer(*net.init(KEY, jnp.ones((2, 4))), jnp.ones((2, 4))).shape == (2, 3)


def test_normalized_refuses_other_numbers_of_channels():
    with pytest.raises(ValueError, match=r"of 3 and 1 channels do not fit images \[2, 8, 8, 1\]"):
        jn.normalized(jn.from_linen(models.SmallCNN()), [0.1, 0.2, 0.3], 0.5).init(KEY, jnp.ones((2, 8, 8, 1)))


@pytest.mark.parametrize("make", [models.AlexNet.small, models.ZFNet.small, models.LeNet5.modern])
def test_equal_networks_of_a_kind_share_their_functions(make):
    assert jn.from_linen(make()) == jn.from_linen(make())


class Sowing(nn.Module):
    """Sows a penalty into a collection of its own."""

    @nn.compact
    def __call__(self, x):
        self.sow("losses", "size", jnp.sum(x**2))
        return nn.Dense(3)(x)


def test_collections_that_grow_are_refused():
    """A step would be compiled anew each time, and a run could not be resumed."""
    net, x = jn.from_linen(Sowing()), jnp.ones((2, 4))
    params, stats = net.init(KEY, x)
    for train in (net.train, net.activations):
        with pytest.raises(ValueError, match="the collection 'losses' has grown in a call, as what modules sow does"):
            train(params, stats, x, KEY)
    assert net.infer(params, stats, x).shape == (2, 3)
    stats.pop("losses")
    assert net.train(params, stats, x, KEY)[1] == {}


class Named(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, deterministic=True):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(0.5, deterministic=deterministic)(x)


class NamedOtherwise(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training)(x)
        return nn.Dropout(0.5)(x, deterministic=not training)


@pytest.mark.parametrize("module", [Named(), NamedOtherwise()])
def test_modules_are_told_by_every_name_that_they_train(module):
    net, x = jn.from_linen(module), jax.random.uniform(KEY, (8, 6))
    params, stats = net.init(KEY, x)
    (one, moved), (other, _) = (net.train(params, stats, x, jax.random.key(seed)) for seed in (1, 2))
    assert (one != other).any()
    assert (moved["batch_stats"]["BatchNorm_0"]["mean"] > 0).all()
    assert (net.infer(params, stats, x) != 0).all()
