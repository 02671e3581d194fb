"""MART's loss with its constants, at ordinary and at saturated logits, and smoothed labels."""

import jax
import jax.numpy as jnp
import numpy as np
import objective_references as ref
import optax
import pytest

import jaxnets as jn

Z = np.random.default_rng(0).normal(size=(40, 5)) * 4
Y = np.arange(40) % 5


def test_boosted_cross_entropy(x64):
    for z in (Z, Z - 100, Z[:, :2]):
        y = Y % z.shape[1]
        expected = ref.boosted_cross_entropy(z, y)
        np.testing.assert_allclose(jn.losses.boosted_cross_entropy(jnp.asarray(z), jnp.asarray(y)), expected, rtol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_saturated_logits_stay_finite(sign):
    """A probability of one: ``log(1.0001 - 1)`` is -9.2, and its gradient is finite."""
    z, y = sign * jnp.array([[1e4, 0.0, -1e4]]), jnp.array([0])
    value, gradient = jax.value_and_grad(lambda z: jn.losses.boosted_cross_entropy(z, y).sum())(z)
    np.testing.assert_allclose(value, 0 if sign > 0 else 20000 - np.log(1e-4), atol=2e-3, rtol=1e-3)
    assert np.isfinite(gradient).all()


def test_boosted_cross_entropy_needs_two_classes():
    with pytest.raises(ValueError, match="boosted_cross_entropy needs at least 2 classes"):
        jn.losses.boosted_cross_entropy(jnp.zeros((3, 1)), jnp.zeros(3, int))


def test_a_row_that_cannot_be_attacked_at_all_costs_nothing_more():
    """Where clean and attacked predictions are alike the divergence is zero but for the floor, and finite anywhere."""
    net = jn.from_linen(jn.models.MLP((), 3))
    x, y = jnp.full((2, 4), 1e3), jnp.array([0, 1])
    params, stats = net.init(jax.random.key(0), x)
    objective = jn.objectives.mart(net, lambda key, model, x, y: x)
    (value, (_, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(
        params, stats, jn.types.Batch(x, y), jax.random.key(1)
    )
    assert abs(metrics["divergence"]) < 1e-5
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_smoothed_labels_are_those_of_optax():
    z, y = jnp.asarray(Z, jnp.float32), jnp.asarray(Y)
    soft = optax.smooth_labels(jax.nn.one_hot(y, 5), 0.2)
    expected = optax.softmax_cross_entropy(z, soft)
    np.testing.assert_allclose(jn.losses.smoothed(0.2)(z, y), expected, rtol=1e-5)
    np.testing.assert_allclose(jn.losses.smoothed(0.2)(z, jax.nn.one_hot(y, 5)), expected, rtol=1e-5)
    assert jn.losses.smoothed(0.2) == jn.losses.smoothed(0.2) != jn.losses.smoothed(0.1)
    assert hash(jn.losses.smoothed(0.2)) == hash(jn.losses.smoothed(0.2))
