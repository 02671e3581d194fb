"""FMN, step by step against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.fmn import fmn

THREATS = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1, "L0": jn.L0}


def mlp(w1, b1, w2, b2, x):
    return jnp.tanh(x @ w1 + b1) @ w2 + b2


def margin_gradient(net, x, y):
    """The margin's value and gradient at ``x``, by hand."""
    logits = net.logits(x)
    other = np.argmax(np.where(np.arange(len(logits)) == y, -np.inf, logits))
    hidden = np.tanh(x @ net.w1 + net.b1)
    return logits[other] - logits[y], net.w1 @ ((net.w2[:, other] - net.w2[:, y]) * (1 - hidden**2))


def next_radius(order, radius, shift, success, smallest, size, value, gradient):
    if order == 0:
        if success:
            return max(min(radius - 1, np.floor(radius * (1 - shift)), smallest), 1)
        return max(radius + 1, np.floor(radius * (1 + shift)))
    if success:
        return min(radius * (1 - shift), smallest)
    if np.isfinite(smallest):
        return radius * (1 + shift)
    return (size + abs(value) / np.linalg.norm(gradient, references.dual(order))) * (1 + shift)


def reference(order, net, x, y, *, steps, gamma, step_size, sign=1):
    """One row: the smallest successful perturbation and how many of the points looked at have succeeded."""
    point, radius, best, smallest, successes = x, 1.0, x, np.inf, 0
    for step in range(steps + 1):
        size = np.linalg.norm(point - x, order)
        success = (net.logits(point).argmax() == y) == (sign < 0)
        successes += success
        if success and size < smallest:
            best, smallest = point, size
        value, gradient = margin_gradient(net, point, y)
        gradient = sign * gradient
        shift, length = (last + (first - last) * (1 + np.cos(np.pi * step / steps)) / 2
                         for first, last in ((gamma, 0.001), (step_size, step_size / 100)))  # fmt: skip
        radius = next_radius(order, radius, shift, success, smallest, size, value, gradient)
        radius = min(radius, np.linalg.norm(np.maximum(x, 1 - x), order))
        z = point + length * references.direction(2, gradient, point, 0, 1)
        if order != 0:
            z = x + (z - x) * max(1, radius / np.linalg.norm(z - x, order))
        point = references.project(order, z, x, radius, 0, 1)
    return best, successes


@pytest.mark.parametrize("sign", [1, -1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
def test_fmn_against_numpy(cls, sign, x64):
    net = references.TanhMLP(seed=0, inputs=8, hidden=7, classes=3)
    x = np.random.default_rng(1).uniform(size=(6, 8))
    clean = np.array([net.logits(row).argmax() for row in x])
    target = clean if sign > 0 else (clean + 1) % 3
    loss = jn.losses.margin if sign > 0 else jn.losses.targeted(jn.losses.margin)
    logits_fn = Partial(mlp, *map(jnp.asarray, net.arrays()))
    counts = []
    for steps in (1, 12):
        settings = {"steps": steps, "gamma": 0.1, "step_size": 0.7}
        arguments = jax.random.key(0), logits_fn, jnp.asarray(x), jnp.asarray(target)
        result = fmn(*arguments, threat=cls(jnp.inf), loss=loss, **settings)
        for row in range(len(x)):
            best, successes = reference(
                references.ORDERS[cls.__name__], net, x[row], target[row], sign=sign, **settings
            )
            np.testing.assert_allclose(result[row], best, rtol=0, atol=1e-7)
            counts.append(successes)
    assert max(counts) >= 4
