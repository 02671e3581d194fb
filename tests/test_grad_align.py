"""Gradient alignment: where it is zero, where gradients are, and its second derivatives through convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.objectives.grad_align import _misalignment
from jaxnets.types import Batch

KEY = jax.random.key(0)


def test_misalignment_of_rows():
    """Equal, turned by a right angle, opposite, and of whatever length; rows without a gradient are left out."""
    first = jnp.array([[1.0, 0], [1, 0], [1, 0], [0, 0], [1, 0]])
    second = jnp.array([[2e-20, 0], [0, 3e20], [-1, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(jax.jit(_misalignment)(first, second), (0 + 1 + 2) / 3, rtol=1e-6)
    assert jax.jit(_misalignment)(jnp.zeros((5, 2)), second) == 0


def test_zero_gradients_have_a_finite_derivative():
    @jax.jit
    @jax.grad
    def derivative(scale):
        return _misalignment(scale * jnp.ones((2, 3)), jnp.ones((2, 3)))

    assert derivative(0.0) == 0
    assert np.isfinite(derivative(1e-20))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(jn.models.layers.Conv(3, (3, 3))(x))
        return nn.Dense(2)(jn.models.layers.max_pool(x).reshape(len(x), -1))


@pytest.mark.slow
def test_double_backpropagation_through_convolution_and_pooling(x64):
    """Against a central difference along a random direction."""
    net, random = jn.from_linen(Convolutional()), np.random.default_rng(0)
    batch = Batch(jnp.asarray(random.uniform(size=(3, 4, 4, 1))), jnp.array([0, 1, 1]))
    params, stats = net.init(KEY, batch.x)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    objective = jn.objectives.grad_align(jn.objectives.standard(net), net, jn.Linf(0.2), weight=1.0)
    value_of = jax.jit(lambda params: objective(params, stats, batch, KEY)[0])
    direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), params)
    ahead, behind = (value_of(jax.tree.map(lambda p, d: p + h * d, params, direction)) for h in (1e-5, -1e-5))  # noqa: B023
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.jit(jax.grad(value_of))(params), direction)))
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)
