"""The elastic-net attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial
from test_carlini_wagner import curved, tilted

import jaxnets as jn
from jaxnets.attacks.ead import ead, elastic_net, fista
from jaxnets.attacks.parts.calling import row_keys

KEY = jax.random.key(0)
L1 = jn.L1(jnp.inf)


@pytest.mark.parametrize("shift", [0.0, -10.0])
def test_nearest_boundary_of_a_linear_model(shift):
    x, y, logits_fn, gap, w = tilted()
    threat = jn.L1(jnp.inf, lower=shift, upper=shift + 1)
    x_adv = ead(KEY, lambda z: logits_fn(z - shift), x + shift, y, threat=threat, steps=200, beta=0.05)
    ratio = references.norm(1, x_adv - shift - x) / (gap / np.abs(w).max())
    assert (jnp.argmax(logits_fn(x_adv - shift), axis=1) != y).all()
    # Only the largest coordinates of the normal pay.
    assert ratio.max() < 1.05, ratio
    assert (np.abs(x_adv - shift - x) > 1e-5).sum(axis=1).max() <= 3


def test_a_step_against_numpy(x64):
    random = np.random.default_rng(0)
    x, beta, step_size, steps = random.uniform(0, 0.3, size=7), 0.05, 0.1, 9
    gradients = random.normal(size=(5, 7))
    minimiser, threat = fista(step_size, beta, steps), jn.L1(1.0)
    state, d, e = minimiser.init(threat, x, x), np.zeros(7), np.zeros(7)
    for k, gradient in enumerate(gradients):
        point = minimiser.place(state, threat, x)
        np.testing.assert_allclose(point, np.clip(x + e, 0, 1), atol=1e-12)
        state = minimiser.step(state, threat, x, point, 0.0, jnp.asarray(gradient))
        z = np.clip(x + e, 0, 1) - x - step_size * np.sqrt(1 - k / steps) * gradient
        shrunk = np.where(z > beta, z - beta, np.where(z < -beta, z + beta, 0))
        previous, d = d, np.clip(x + shrunk, 0, 1) - x
        e = d + k / (k + 3) * (d - previous)
    np.testing.assert_allclose(state.ahead, e, atol=1e-12)


def test_a_larger_beta_changes_fewer_coordinates():
    x, y, logits_fn, _, _ = tilted()
    changed = [
        np.median((np.asarray(ead(KEY, logits_fn, x, y, threat=L1, steps=200, beta=beta)) != x).sum(axis=1))
        for beta in (1e-4, 0.05)
    ]
    assert changed[1] < changed[0]


@pytest.mark.slow
def test_decision_rules_rank_the_same_successes():
    x, y, logits_fn = curved()
    settings = {"threat": L1, "steps": 100, "step_size": 0.05, "beta": 0.01}
    by_l1 = ead(KEY, logits_fn, x, y, **settings)
    by_net = ead(KEY, logits_fn, x, y, decision=elastic_net(0.01), **settings)
    found = np.asarray(jnp.argmax(logits_fn(by_l1), axis=1) != y)
    assert found.sum() >= 6
    net = jax.vmap(elastic_net(0.01))
    assert (references.norm(1, by_l1 - x) <= references.norm(1, by_net - x) + 1e-5).all()
    assert (net(by_net - x) <= net(by_l1 - x) + 1e-5).all()
    assert (references.norm(1, by_l1 - x) < references.norm(1, by_net - x) - 1e-3).any()


def test_binary_pixels_targets_epsilon_and_rows():
    x, y, logits_fn = curved()
    keys, settings = row_keys(KEY, 8), {"steps": 100, "step_size": 0.05, "loss": jn.losses.targeted(jn.losses.margin)}
    wanted = (y + 1) % 4
    free = ead(keys, logits_fn, x, wanted, threat=L1, **settings)
    there = np.asarray(jnp.argmax(logits_fn(free), axis=1) == wanted)
    assert there.sum() >= 5
    np.testing.assert_array_equal(free[~there], x[~there])
    faces = ((x == 0) | (x == 1)) & there[:, None]
    assert (np.asarray(free != x) & np.asarray(faces)).any()
    first = ead(keys[:3], logits_fn, x[:3], wanted[:3], threat=L1, **settings)
    np.testing.assert_allclose(first, free[:3], atol=1e-4)
    epsilon = float(np.median(references.norm(1, free - x)[there]))
    held = ead(keys, logits_fn, x, wanted, threat=jn.L1(epsilon), **settings)
    references.assert_inside(jn.L1(epsilon), held, x)
    assert (references.norm(1, held - x) > 0).sum() >= 2
    np.testing.assert_array_equal(ead(keys, logits_fn, x, y, threat=L1, **settings), x)


def test_constant_and_broken_models_and_other_threats():
    x, y, _ = curved()
    for value in (0.0, jnp.nan):
        logits_fn = Partial(lambda value, x: jnp.full((len(x), 4), value), jnp.asarray(value))
        np.testing.assert_array_equal(ead(KEY, logits_fn, x, jnp.zeros_like(y), threat=L1, steps=10), x)
    with pytest.raises(ValueError, match="supports the threats L1 and L2, got Linf"):
        ead(KEY, logits_fn, x, y, threat=jn.Linf(1.0))
