"""A stage without a derivative, given one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.bpda import bpda

KEY = jax.random.key(0)


def test_value_of_one_function_and_derivative_of_another():
    stage, x, t = bpda(jnp.round, jnp.sin), jnp.array([0.2, 0.7, 1.6]), jnp.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(stage(x), jnp.round(x))
    value, tangent = jax.jvp(stage, (x,), (t,))
    np.testing.assert_array_equal(value, jnp.round(x))
    np.testing.assert_allclose(tangent, jnp.cos(x) * t, rtol=1e-6)
    expected = 2 * jnp.round(x) * jnp.cos(x)
    gradient = jax.grad(lambda x: jnp.sum(stage(x) ** 2))
    for transformed in (gradient, jax.jit(gradient), jax.vmap(jax.grad(lambda x: stage(x) ** 2))):
        np.testing.assert_allclose(transformed(x), expected, rtol=1e-5)
    # Of the derivative 2 f(x) b'(x) again, f has that of b.
    second = jax.grad(jax.grad(lambda x: stage(x) ** 2))(0.7)
    np.testing.assert_allclose(second, 2 * np.cos(0.7) ** 2 - 2 * 1.0 * np.sin(0.7), rtol=1e-5)


def test_arrays_inside_are_leaves_and_new_ones_mean_no_new_trace():
    traces = []

    @jax.jit
    def slope(stage, x):
        traces.append(0)
        return jax.grad(lambda x: stage(x).sum())(x)

    shift = lambda by, x: jnp.round(x + by)  # noqa: E731
    scale = lambda by, x: by * x  # noqa: E731
    for number in (2.0, 3.0):
        stage = bpda(Partial(shift, jnp.array(number)), Partial(scale, jnp.array(number)))
        assert len(jax.tree.leaves(stage)) == 2
        np.testing.assert_array_equal(slope(stage, jnp.zeros(3)), number)
    assert len(traces) == 1


def test_a_program_outside_jax_and_a_key_inside():
    outside = lambda x: jax.pure_callback(lambda x: np.round(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # noqa: E731
    assert jax.grad(lambda x: bpda(outside)(x) * 3)(1.2) == 3.0
    drawn = Partial(lambda key, x: jnp.round(x + jax.random.uniform(key)), KEY)
    assert jax.jit(jax.grad(lambda x, drawn: bpda(drawn)(x) * 3))(1.2, drawn) == 3.0


def test_results_that_differ_raise():
    with pytest.raises(ValueError, match=r"float32\[2\] from forward and float32\[3\] from backward"):
        bpda(lambda x: x[:2])(jnp.zeros(3))
    with pytest.raises(ValueError, match="int32"):
        bpda(lambda x: x.astype(jnp.int32))(jnp.zeros(3))


def quantized(x):
    """Nine levels of the mean of each 2x2 block: flat almost everywhere, as a JPEG decoder's result is."""
    blocks = x.reshape(len(x), 2, 2, 2, 2, 1).mean(axis=(2, 4))
    return jnp.round(blocks * 8) / 8


def as_blocks(x):
    return x.reshape(len(x), 2, 2, 2, 2, 1).mean(axis=(2, 4))


def test_pgd_is_blind_to_quantization_until_it_gets_a_derivative():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(0.3, 0.7, size=(32, 4, 4, 1)), jnp.float32)
    weights = jnp.asarray(random.normal(size=(4, 3)), jnp.float32)
    behind = lambda stage, x: (stage(x).reshape(len(x), -1) - 0.5) @ weights  # noqa: E731
    blind, seeing = Partial(behind, Partial(quantized)), Partial(behind, bpda(quantized, as_blocks))
    np.testing.assert_array_equal(blind(x), seeing(x))
    y = jnp.argmax(blind(x), axis=1)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.3), steps=10, start=jn.attacks.at_clean)
    np.testing.assert_array_equal(attack(KEY, blind, x, y), x)
    broken = jnp.argmax(blind(attack(KEY, seeing, x, y)), axis=1) != y
    assert broken.mean() > 0.9
