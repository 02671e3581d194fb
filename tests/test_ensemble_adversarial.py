"""Ensemble adversarial training: on which model the rows are attacked."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.types import Batch

NET = jn.from_linen(jn.models.MLP((), 2))
ATTACK = partial(jn.attacks.fgsm, threat=jn.Linf(0.1))
PARAMS = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "bias": jnp.zeros(2)}}
BATCH = Batch(jnp.full((3, 2), 0.5), jnp.array([0, 0, 0]))


def test_every_model_takes_its_turn():
    """Models whose gradients point to different corners."""
    others = [lambda x: -x, lambda x: x * jnp.array([1.0, 0.0])]
    objective = jn.objectives.ensemble_adversarial(NET, ATTACK, others)
    keys = jax.random.split(jax.random.key(0), 300)
    found = np.asarray(jax.jit(jax.vmap(lambda key: objective.inner(PARAMS, {}, BATCH, key)))(keys))
    corners = {
        tuple(np.round(np.asarray(ATTACK(keys[0], model, *BATCH))[0], 3).tolist()): name
        for name, model in zip("abc", [*others, NET.logits_fn(PARAMS, {})], strict=True)
    }
    assert len(corners) == 3
    counts = Counter(corners[tuple(np.round(x_adv[0], 3).tolist())] for x_adv in found)
    assert min(counts[name] for name in "abc") > 70, "a third of the batches each"
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1], found.shape))


def test_without_other_models():
    with pytest.raises(ValueError, match="at least one other model, got none: see adversarial"):
        jn.objectives.ensemble_adversarial(NET, ATTACK, [])


def test_random_signs():
    """The first half of RAND+FGSM: corners of the inner ball, cut to the box; with a step of the other half, inside."""
    x = jnp.full((50, 40), 0.5).at[:, 0].set(0.0)
    keys = jax.random.split(jax.random.key(1), 50)
    moved = np.asarray(jn.attacks.random_signs(0.05)(keys, jn.Linf(0.1), x) - x)
    np.testing.assert_allclose(np.abs(moved[:, 1:]), 0.05, rtol=1e-5)
    assert abs(moved[:, 1:].mean()) < 0.005
    assert set(np.unique(moved[:, 0]).round(3)) == {0, np.float32(0.05).round(3)}
