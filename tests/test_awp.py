"""Adversarial weight perturbation against numpy; what it perturbs, what it leaves, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import objective_references as ref
import optax
import pytest
from test_objective_contract import KEY, NET, problem, shifted

import jaxnets as jn
from jaxnets.objectives import awp


def test_value_and_gradient_are_those_at_the_perturbed_weights(x64):
    params, stats, batch = problem()
    objective = jn.objectives.adversarial(NET, shifted)
    run = jax.jit(jax.value_and_grad(awp(objective, gamma=0.05), has_aux=True))
    (value, (moved, metrics)), gradient = run(params, stats, batch, KEY)
    x_adv = np.asarray(shifted(None, None, batch.x, None))

    def at(arrays):
        return ref.cross_entropy(ref.forward(arrays, x_adv), np.asarray(batch.y)).mean()

    arrays = ref.leaves(params)
    away = ref.weight_perturbation(arrays, ref.gradient(at, arrays), 0.05)
    there = {name: array + away[name] for name, array in arrays.items()}
    np.testing.assert_allclose(value, at(there), rtol=1e-9)
    assert value > at(arrays) + 0.02
    assert metrics["loss"] == value
    expected = ref.gradient(at, there)
    for name, found in ref.leaves(gradient).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-6, atol=1e-8)
    mean, _ = ref.moved(there, [x_adv])
    np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-8)


def squares(params, stats, batch, key):
    """Half the sum of all squares: its gradient is the parameters it is asked at."""
    value = sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(params))
    return value, (stats, {"loss": value})


WEIGHTS = {
    "kernel": jnp.array([[3.0, 4.0]]),
    "bias": jnp.array([5.0]),
    "attention": {"kernel": jnp.ones((2, 2, 3)), "bias": jnp.ones((2, 3))},
}


def test_each_layer_by_its_own_length_and_no_biases():
    """Nor those of attention, a row for each head."""
    gradient, _ = jax.jit(jax.grad(awp(squares, gamma=0.1), has_aux=True))(WEIGHTS, {}, None, KEY)
    for found, weights in ((gradient, WEIGHTS), (gradient["attention"], WEIGHTS["attention"])):
        np.testing.assert_allclose(found["kernel"], 1.1 * weights["kernel"], rtol=1e-6)
        np.testing.assert_array_equal(found["bias"], weights["bias"])


def test_weights_are_restored_bit_for_bit():
    optimizer = optax.sgd(0.0)
    state = jn.training.init_state(KEY, WEIGHTS, {}, optimizer)
    step = jax.jit(jn.training.make_step(awp(squares, gamma=0.3), optimizer))
    for _ in range(3):
        state, _ = step(state, None)
    jax.tree.map(np.testing.assert_array_equal, state.params, WEIGHTS)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    def scaled(params, stats, batch, key):
        return scale * jnp.sum(params["kernel"]), ({}, {"kernel": params["kernel"]})

    _, (_, metrics) = jax.jit(awp(scaled, gamma=0.1))(WEIGHTS, {}, None, KEY)
    away = metrics["kernel"] - WEIGHTS["kernel"]
    np.testing.assert_allclose(away, 0.5 / np.sqrt(2) * np.ones((1, 2)) * (scale > 0), rtol=1e-5)


def test_the_attack_is_made_once_on_the_weights_as_they_are():
    asked = []

    def inner(params, stats, batch, key):
        asked.append(params["kernel"])
        return params["kernel"]

    def outer(params, stats, batch, examples, key):
        value = jnp.sum(params["kernel"] ** 2) + jnp.sum(examples)
        return value, (stats, {"loss": value, "examples": examples})

    game = awp(jn.objectives.MinMax(inner, outer), gamma=0.1)
    gradient, (_, metrics) = jax.grad(game, has_aux=True)(WEIGHTS, {}, None, KEY)
    assert len(asked) == 1
    np.testing.assert_array_equal(metrics["examples"], WEIGHTS["kernel"])
    np.testing.assert_allclose(gradient["kernel"], 2.2 * WEIGHTS["kernel"], rtol=1e-6)
