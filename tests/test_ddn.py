"""DDN, step by step against numpy, and its levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.ddn import ddn

KEY = jax.random.key(0)


def mlp(w1, b1, w2, b2, x):
    return jnp.tanh(x @ w1 + b1) @ w2 + b2


def scene(rows=6):
    net = references.TanhMLP(seed=0, inputs=8, hidden=7, classes=3)
    x = np.random.default_rng(1).uniform(size=(rows, 8))
    return net, Partial(mlp, *map(jnp.asarray, net.arrays())), x


def reference(net, x, y, *, steps, gamma, radius=1.0, step_size=1.0, sign=1):
    """Algorithm 1 of the paper for one row: the smallest successful perturbation and its size."""
    delta, best, smallest = np.zeros_like(x), x, np.inf
    for step in range(steps + 1):
        success = (net.logits(x + delta).argmax() == y) == (sign < 0)
        if success and np.linalg.norm(delta) < smallest:
            best, smallest = x + delta, np.linalg.norm(delta)
        gradient = sign * net.cross_entropy_gradient(x + delta, y)
        length = step_size * (0.01 + 0.99 * (1 + np.cos(np.pi * step / steps)) / 2)
        moved = delta + length * gradient / np.linalg.norm(gradient)
        radius = min(radius * (1 - gamma if success else 1 + gamma), np.linalg.norm(np.maximum(x, 1 - x)))
        delta = np.clip(x + radius * moved / np.linalg.norm(moved), 0, 1) - x
    return best, smallest


@pytest.mark.parametrize("sign", [1, -1], ids=["untargeted", "targeted"])
def test_ddn_against_numpy(sign, x64):
    net, logits_fn, x = scene()
    clean = np.array([net.logits(row).argmax() for row in x])
    target = clean if sign > 0 else (clean + 1) % 3
    loss = jn.losses.cross_entropy if sign > 0 else jn.losses.targeted(jn.losses.cross_entropy)
    found = 0
    for steps in (1, 5, 25):
        result = ddn(
            KEY, logits_fn, jnp.asarray(x), jnp.asarray(target), threat=jn.L2(jnp.inf), steps=steps, loss=loss,
            gamma=0.1, radius=1.5, step_size=0.8,
        )  # fmt: skip
        for row in range(len(x)):
            settings = {"steps": steps, "gamma": 0.1, "radius": 1.5, "step_size": 0.8, "sign": sign}
            best, smallest = reference(net, x[row], target[row], **settings)
            np.testing.assert_allclose(result[row], best, rtol=0, atol=1e-9)
            found += np.isfinite(smallest)
    assert found > 6


def test_perturbations_have_the_levels_of_a_byte():
    _, logits_fn, x = scene()
    x = jnp.asarray(np.round(x * 255) / 255, jnp.float32)
    y = jnp.argmax(logits_fn(x), axis=1)
    free = ddn(KEY, logits_fn, x, y, threat=jn.L2(jnp.inf))
    for levels, low, high in ((256, 0.0, 1.0), (16, -1.0, 2.0)):
        x_adv = ddn(KEY, logits_fn, x, y, threat=jn.L2(jnp.inf, low, high), levels=levels)
        whole = (np.asarray(x_adv, np.float64) - low) / (high - low) * (levels - 1)
        moved = np.asarray(x_adv != x).any(axis=1)
        assert moved.sum() >= 4
        np.testing.assert_allclose(whole[moved], np.round(whole[moved]), atol=1e-3)
        assert (jnp.argmax(logits_fn(x_adv), axis=1) != y)[moved].all()
    whole = np.asarray(free, np.float64) * 255
    assert np.abs(whole - np.round(whole)).max() > 0.1


def test_too_few_levels_raise():
    _, logits_fn, x = scene()
    with pytest.raises(ValueError, match="at least 2 levels, got levels=1"):
        ddn(KEY, logits_fn, jnp.asarray(x), jnp.zeros(6, int), threat=jn.L2(1.0), levels=1)
