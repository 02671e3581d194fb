"""sigma-zero, step by step against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial
from test_fmn import margin_gradient, mlp

import jaxnets as jn
from jaxnets.attacks.sigma_zero import sigma_zero


def reference(net, x, y, *, steps, sigma=1e-3, threshold=0.3, pace=0.01, sign=1):
    """One row: the sparsest successful perturbation and its number of coordinates."""
    delta, length, best, fewest = np.zeros_like(x), 1.0, x, np.inf
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(steps + 1):
        success = (net.logits(x + delta).argmax() == y) == (sign < 0)
        if success and np.count_nonzero(delta) < fewest:
            best, fewest = x + delta, np.count_nonzero(delta)
        h = 1e-6
        count = lambda d: np.mean(d**2 / (d**2 + sigma))  # noqa: E731
        gradient = np.array([(count(delta + h * e) - count(delta - h * e)) / (2 * h) for e in np.eye(len(x))])
        gradient -= (not success) * sign * margin_gradient(net, x + delta, y)[1]
        gradient /= np.abs(gradient).max() or 1
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        delta = np.clip(x + delta - length * mean / (np.sqrt(spread) + 1e-8), 0, 1) - x
        length = 0.1 + 0.9 * (1 + np.cos(np.pi * step / steps)) / 2
        threshold = np.clip(threshold + (1 if success else -1) * pace * length, 0, 1)
        delta = np.where(np.abs(delta) < threshold, 0, delta)
    return best, fewest


@pytest.mark.parametrize("sign", [1, -1], ids=["untargeted", "targeted"])
def test_sigma_zero_against_numpy(sign, x64):
    net = references.TanhMLP(seed=0, inputs=8, hidden=7, classes=3)
    x = np.random.default_rng(1).uniform(size=(6, 8))
    clean = np.array([net.logits(row).argmax() for row in x])
    target = clean if sign > 0 else (clean + 1) % 3
    loss = jn.losses.margin if sign > 0 else jn.losses.targeted(jn.losses.margin)
    logits_fn = Partial(mlp, *map(jnp.asarray, net.arrays()))
    counts = []
    for steps in (1, 4, 15):
        arguments = jax.random.key(0), logits_fn, jnp.asarray(x), jnp.asarray(target)
        result = sigma_zero(*arguments, threat=jn.L0(jnp.inf), loss=loss, steps=steps)
        for row in range(len(x)):
            best, fewest = reference(net, x[row], target[row], steps=steps, sign=sign)
            np.testing.assert_allclose(result[row], best, rtol=0, atol=1e-5)
            counts.append(fewest)
    assert np.isfinite(counts).sum() > 6
    assert len(set(counts)) > 2
