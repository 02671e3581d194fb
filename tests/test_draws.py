"""Keys by which rows draw for themselves, made of those that cannot."""

import jax
import numpy as np
import pytest

from jaxnets.draws import is_threefry, threefry


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_each_key_gives_its_own_in_any_array(kind):
    shape = jax.random.key_data(jax.random.key(0, impl=kind)).shape
    words = np.random.default_rng(0).integers(0, 2**32, (6, *shape), dtype=np.uint32)
    keys = jax.random.wrap_key_data(words, impl=kind).reshape(2, 3)
    made = jax.random.key_data(threefry(keys))
    assert is_threefry(threefry(keys))
    assert len(np.unique(made.reshape(6, 2), axis=0)) == 6
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(jax.random.key_data(threefry(keys[place])), made[place])


def test_every_word_of_a_key_counts():
    words = np.ones((5, 4), np.uint32)
    words[np.arange(4), np.arange(4)] = 2
    made = jax.random.key_data(threefry(jax.random.wrap_key_data(words, impl="rbg")))
    assert len(np.unique(made, axis=0)) == 5


def test_threefry_keys_stay():
    key = jax.random.key(3, impl="threefry2x32")
    assert threefry(key) is key
