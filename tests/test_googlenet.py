"""GoogLeNet's auxiliary heads: there for training and for activations, and for nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets import models

KEY = jax.random.key(0)
PUBLISHED = jn.from_linen(models.GoogLeNet(10, width=1 / 16))


def images(side):
    return jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)


@pytest.fixture(scope="module")
def published():
    """Shapes of parameters and statistics, by the smallest images that the heads take."""
    return jax.eval_shape(PUBLISHED.init, KEY, images(79))


def test_published_form_takes_images_too_small_for_the_heads(published):
    assert jax.eval_shape(PUBLISHED.infer, *published, images(64)).shape == (2, 10)
    assert jax.eval_shape(PUBLISHED.train, *published, images(32), KEY)[0].shape == (2, 10)


def test_heads_that_images_are_too_small_for_say_so(published):
    said = "see windows of 5x5 in maps of 4x4: initialise and train it with images of 79x79 or more"
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(PUBLISHED.init, KEY, images(78))
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(PUBLISHED.activations, *published, images(64))


def test_inference_and_plain_training_need_no_parameters_of_the_heads(published):
    params, stats = published
    assert {"aux1", "aux2"} <= set(params)
    without = {name: part for name, part in params.items() if not name.startswith("aux")}
    assert jax.eval_shape(PUBLISHED.infer, without, stats, images(96)).shape == (2, 10)
    seen = jax.eval_shape(PUBLISHED.activations, params, stats, images(79), KEY)[2]
    assert seen["aux1"].shape == seen["aux2"].shape == (2, 10)


@pytest.mark.slow
def test_statistics_of_the_heads_move_where_their_logits_are_asked_for():
    net, x = jn.from_linen(models.GoogLeNet.small(width=1 / 16)), jax.random.uniform(KEY, (2, 32, 32, 3))
    params, stats = jax.jit(net.init)(KEY, x)
    logits, moved = jax.jit(net.train)(params, stats, x, KEY)
    same, with_heads, _ = jax.jit(net.activations)(params, stats, x, KEY)
    np.testing.assert_allclose(same, logits, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(moved) == jax.tree.structure(with_heads) == jax.tree.structure(stats)
    for name, part in stats["batch_stats"].items():
        stays = jax.tree.map(np.array_equal, part, moved["batch_stats"][name])
        assert all(jax.tree.leaves(stays)) == name.startswith("aux")
        if name.startswith("aux"):
            assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, part, with_heads["batch_stats"][name])))
        else:
            close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
            jax.tree.map(close, moved["batch_stats"][name], with_heads["batch_stats"][name])
