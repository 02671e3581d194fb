"""Objectives: values and gradients against finite differences and numpy; statistics, dropout, and networks from NNX."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from finite_differences import assert_slope
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.types import Batch

KEY = jax.random.key(0)


class Noisy(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def identity_attack(key, logits_fn, x, target):
    return x


def batch_of(seed=0, rows=6, inputs=4, classes=3, dtype=np.float32):
    random = np.random.default_rng(seed)
    x = random.uniform(0.2, 0.8, size=(rows, inputs)).astype(dtype)
    return Batch(jnp.asarray(x), jnp.asarray(random.integers(0, classes, rows)))


def network(module, batch):
    net = jn.from_linen(module)
    return net, *net.init(KEY, batch.x)


SIGNS = partial(jn.attacks.fgsm, threat=jn.Linf(0.05))
STEPS = partial(jn.attacks.pgd, threat=jn.Linf(0.05), steps=3)


# Against numpy, on a linear model.


def softmax_regression(params, x, y):
    """Mean cross-entropy of a linear model, its gradients, and its accuracy."""
    kernel, bias = (np.asarray(params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    logits = x @ kernel + bias
    error = np.exp([references.log_softmax(z) for z in logits])
    error[np.arange(len(x)), y] -= 1
    value = np.mean([references.cross_entropy(*row) for row in zip(logits, y, strict=True)])
    gradient = {"kernel": x.T @ error / len(x), "bias": error.mean(axis=0)}
    return value, gradient, (logits.argmax(axis=1) == y).mean(), error @ kernel.T


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_value_and_gradient_of_a_linear_model(epsilon, x64):
    batch = batch_of(dtype=np.float64)
    net, params, stats = network(jn.models.MLP((), classes=3), batch)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    x, y = map(np.asarray, batch)
    if epsilon:
        x = x + epsilon * np.sign(softmax_regression(params, x, y)[-1])
        objective = jn.objectives.adversarial(net, partial(jn.attacks.fgsm, threat=jn.Linf(epsilon)))
    else:
        objective = jn.objectives.standard(net)
    value, gradient, accuracy, _ = softmax_regression(params, x, y)
    (got, (stats, metrics)), got_gradient = jax.value_and_grad(objective, has_aux=True)(params, stats, batch, KEY)
    np.testing.assert_allclose(got, value, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], accuracy)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(got_gradient["Dense_0"][name], gradient[name], rtol=1e-10, atol=1e-14)


# Against finite differences.


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("kind", ["standard", "adversarial"])
@pytest.mark.parametrize("module", [jn.models.MLP((7,), 3, jnp.tanh), Noisy()], ids=["MLP", "Noisy"])
def test_gradient_against_finite_differences(kind, module):
    batch = batch_of()
    net, params, stats = network(module, batch)
    with jax.enable_x64(True):
        # Signs, from the clean point: where the attack goes does not change with the parameters by a little.
        objective = jn.objectives.standard(net) if kind == "standard" else jn.objectives.adversarial(net, SIGNS)
        params, stats, batch = double(params), double(stats), Batch(*map(jnp.asarray, (double(batch.x), batch.y)))
        value_of = jax.jit(lambda params: objective(params, stats, batch, KEY)[0])
        gradient = jax.jit(jax.grad(value_of))(params)

        @settings(max_examples=10)
        @given(seed=st.integers(0, 2**32 - 1))
        def check(seed):
            random = np.random.default_rng(seed)
            assert_slope(value_of, gradient, params, random, rtol=1e-5, atol=1e-8)

        check()


def test_no_gradient_flows_through_the_attack():
    """The gradient at the attacked rows, held fixed."""
    batch = batch_of()
    net, params, stats = network(jn.models.MLP((7,), 3), batch)

    def leaning(key, logits_fn, x, target):
        return x + 0.1 * logits_fn(x).mean()

    moved = Batch(leaning(KEY, net.logits_fn(params, stats), *batch), batch.y)
    for_attack = jax.grad(jn.objectives.adversarial(net, leaning), has_aux=True)(params, stats, batch, KEY)[0]
    for_fixed = jax.grad(jn.objectives.standard(net), has_aux=True)(params, stats, moved, KEY)[0]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), for_attack, for_fixed)


# Statistics and dropout.


def test_adversarial_with_the_identity_is_standard_bit_for_bit():
    batch = batch_of()
    net, params, stats = network(Noisy(), batch)
    _, train_key = jax.random.split(KEY)
    adversarial, standard = (
        jax.jit(jax.value_and_grad(objective, has_aux=True))
        for objective in (jn.objectives.adversarial(net, identity_attack), jn.objectives.standard(net))
    )
    got, expected = adversarial(params, stats, batch, KEY), standard(params, stats, batch, train_key)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("kind", ["standard", "adversarial"])
def test_statistics_move_with_the_rows_that_are_trained_on(kind):
    batch = batch_of()
    net, params, stats = network(Noisy(), batch)
    objective = jn.objectives.standard(net) if kind == "standard" else jn.objectives.adversarial(net, STEPS)
    before = jax.tree.map(np.array, stats)
    _, (moved, metrics) = objective(params, stats, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, stats, before)
    attack_key, _ = jax.random.split(KEY)
    x = batch.x if kind == "standard" else STEPS(attack_key, net.logits_fn(params, stats), *batch)
    hidden = np.asarray(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], np.float64)
    np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["mean"], 0.5 * hidden.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["var"], 0.5 + 0.5 * hidden.var(axis=0), atol=1e-5)
    assert jax.tree.structure(moved) == jax.tree.structure(stats)
    assert {name: value.shape for name, value in metrics.items()} == {"loss": (), "accuracy": ()}


def test_attack_sees_inference_mode_and_the_statistics_it_was_given():
    batch = batch_of()
    net, params, stats = network(Noisy(), batch)
    seen = []

    def watching(key, logits_fn, x, target):
        seen.append((logits_fn(x), logits_fn(x[:1])))
        return x

    jn.objectives.adversarial(net, watching)(params, stats, batch, KEY)
    whole, first = seen[0]
    np.testing.assert_array_equal(whole, net.infer(params, stats, batch.x))
    np.testing.assert_allclose(whole[:1], first, rtol=1e-6)


def test_dropout_draws_from_the_key():
    batch = batch_of()
    net, params, stats = network(Noisy(), batch)
    objective = jn.objectives.standard(net)
    values = [objective(params, stats, batch, jax.random.key(seed))[0] for seed in (1, 2, 1)]
    assert values[0] == values[2] != values[1]


def test_attack_and_dropout_draw_from_different_keys():
    batch, keys = batch_of(), []
    net, params, stats = network(jn.models.MLP((), 3), batch)

    def remember(key, *arguments):
        keys.append(key)
        return arguments[1]

    watched = net._replace(train=lambda params, stats, x, key: (keys.append(key), net.train(params, stats, x, key))[1])
    jn.objectives.adversarial(watched, remember)(params, stats, batch, KEY)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in (KEY, *keys)}) == 3


def test_attack_raises_the_loss_that_is_trained():
    batch = batch_of(rows=40)
    net, params, stats = network(jn.models.MLP((16,), 3), batch)
    clean = jn.objectives.standard(net)(params, stats, batch, KEY)[0]
    attacked, (_, metrics) = jn.objectives.adversarial(net, STEPS)(params, stats, batch, KEY)
    assert attacked > clean + 1e-3
    assert metrics["loss"] == attacked


# Other losses.


def test_label_smoothing_through_optax():
    batch = batch_of()
    net, params, stats = network(jn.models.MLP((), 3), batch)

    def smoothed(logits, y):
        return jn.losses.cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(y, 3), 0.1))

    logits = np.asarray(net.infer(params, stats, batch.x))
    soft = 0.9 * np.eye(3)[batch.y] + 0.1 / 3
    expected = np.mean([references.soft_cross_entropy(*row) for row in zip(logits, soft, strict=True)])
    value, (_, metrics) = jn.objectives.standard(net, loss=smoothed)(params, stats, batch, KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    plain = jn.objectives.standard(net)(params, stats, batch, KEY)
    assert abs(plain[0] - value) > 1e-4
    assert plain[1][1]["accuracy"] == metrics["accuracy"]
    attacked = jn.objectives.adversarial(net, STEPS, loss=smoothed)(params, stats, batch, KEY)[0]
    assert attacked > value


# NNX.


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def test_an_nnx_network_under_attack():
    batch = batch_of()
    network = Network(nnx.Rngs(0))
    network.eval()
    graph, state = nnx.split(network)
    traces = []

    def logits(state, x):
        traces.append(0)
        return nnx.merge(graph, state)(x)

    before = jax.tree.map(np.array, nnx.state(network, (nnx.Param, nnx.BatchStat)))
    attack = partial(STEPS, threat=jn.Linf(0.1))
    x_adv = attack(KEY, Partial(logits, state), *batch)
    references.assert_inside(jn.Linf(0.1), x_adv, batch.x)
    gain = jn.losses.cross_entropy(network(x_adv), batch.y) - jn.losses.cross_entropy(network(batch.x), batch.y)
    assert (gain > 0).all()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(network, (nnx.Param, nnx.BatchStat)), before)

    count = len(traces)
    other = Network(nnx.Rngs(1))
    other.eval()
    moved = attack(KEY, Partial(logits, nnx.split(other)[1]), *batch)
    assert len(traces) == count, "new parameters were traced again"
    assert np.abs(moved - x_adv).max() > 1e-3


def test_heads_in_the_middle_are_trained_with_the_network():
    """The value by hand, and a gradient for the heads that is zero without them."""
    net = jn.from_linen(jn.models.ResNet((1, 1), jn.models.resnet.BasicBlock, 4, 4, jn.models.cifar_stem))
    x, y = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3)), jnp.array([0, 3, 1])
    params, stats = net.init(jax.random.key(1), x)

    def train(params, stats, x, key=None):
        logits, stats, seen = net.activations(params, stats, x, key)
        return logits, stats, {"aux1": seen["layer1_0"].mean(axis=(1, 2)), "aux2": -2 * seen["layer1_0"][:, 0, 0]}

    with_heads = net._replace(activations=train)
    value, (moved, metrics) = jn.objectives.auxiliary(with_heads, weight=0.25)(
        params, stats, jn.types.Batch(x, y), jax.random.key(2)
    )
    logits, after, seen = train(params, stats, x, jax.random.key(2))
    expected = sum(
        weight * -np.asarray(jax.nn.log_softmax(values))[np.arange(3), y].mean()
        for weight, values in ((1, logits), (0.25, seen["aux1"]), (0.25, seen["aux2"]))
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert metrics["accuracy"] == np.mean(np.argmax(logits, axis=1) == y)
    jax.tree.map(np.testing.assert_array_equal, moved, after)
    # Attacked rows may be given to them too.
    shifted = jn.objectives.adversarial(
        net, lambda key, model, x, y: x + 0.1, on_attacked=jn.objectives.auxiliary(with_heads)
    )
    on_shifted, _ = jn.objectives.auxiliary(with_heads)(params, stats, jn.types.Batch(x + 0.1, y), jax.random.key(2))
    np.testing.assert_allclose(
        shifted(params, stats, jn.types.Batch(x, y), jax.random.key(2))[0], on_shifted, rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"no activations \['aux1', 'aux2'\]; it has conv1, bn1"):
        jn.objectives.auxiliary(net)(params, stats, jn.types.Batch(x, y), jax.random.key(2))


@pytest.mark.parametrize("name", ["auxiliary", "ibp"])
def test_losses_of_networks_in_half_precision_are_those_of_standard(name):
    net = jn.from_linen(jn.models.MLP((), classes=3))
    half = net._replace(
        train=lambda *arguments: (net.train(*arguments)[0].astype(jnp.bfloat16), {}),
        activations=lambda *arguments: (net.train(*arguments)[0].astype(jnp.bfloat16), {}, {}),
    )
    batch = jn.types.Batch(jax.random.uniform(jax.random.key(0), (8, 5)), jnp.arange(8) % 3)
    params, stats = net.init(jax.random.key(1), batch.x)
    objective = {
        "auxiliary": jn.objectives.auxiliary(half, heads=()),
        "ibp": jn.objectives.ibp(half, jn.Linf(0.1), kappa=1.0),
    }[name]
    expected, _ = jn.objectives.standard(half)(params, stats, batch, jax.random.key(2))
    value, _ = objective(params, stats, batch, jax.random.key(2))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
