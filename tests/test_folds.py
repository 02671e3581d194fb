"""Sums and largest entries in folded order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.folds import largest, total


@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (17,), (5, 7, 3), (28, 28, 1)])
def test_against_numpy(shape):
    values = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    rows = values.reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(jax.vmap(total)(values), rows.sum(axis=1), atol=1e-6 * np.abs(rows).sum())
    np.testing.assert_array_equal(jax.vmap(largest)(values), rows.max(axis=1).astype(np.float32))


@pytest.mark.parametrize("place", [0, 20, 34])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows_wherever_it_is(place, value):
    values = jnp.zeros(35).at[place].set(value)
    np.testing.assert_array_equal([total(values), largest(values)], value)


def test_derivatives_and_types():
    values = jax.random.normal(jax.random.key(0), (5, 7))
    np.testing.assert_array_equal(jax.grad(total)(values), 1)
    np.testing.assert_array_equal(jax.grad(largest)(values), values == jnp.max(values))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int32):
        assert total(values.astype(dtype)).dtype == largest(values.astype(dtype)).dtype == dtype
