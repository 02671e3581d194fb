"""The substitute: what it asks, the points it makes, and that it learns enough of the oracle to fool it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets.substitute import agreement, substitute

KEY = jax.random.key(0)
NET = jn.from_linen(jn.models.MLP((16,), classes=3))
NORMALS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
X = np.random.default_rng(1).uniform(size=(30, 6)).astype(np.float32)
train = partial(substitute, KEY, net=NET, optimizer=optax.adam(0.01), batch_size=10)


def oracle(x):
    """Three classes with straight borders, and nothing but labels; in numpy, as no gradient could pass."""
    assert isinstance(x, np.ndarray)
    return np.argmax((x - 0.5) @ NORMALS, axis=1)


def test_every_point_is_asked_for_once_and_their_number_doubles_at_most():
    asked = []

    def counted(x):
        asked.append(np.array(x))
        return oracle(x)

    result = train(counted, X, rounds=4, epochs=1)
    assert [len(x) for x in asked[:2]] == [30, 30]
    assert 30 < len(asked[2]) <= 60 < len(asked[3]) <= 60 + len(asked[2])
    assert result.queries == len(result.x) == len(result.labels) == sum(map(len, asked))
    assert len(np.unique(result.x, axis=0)) == len(result.x)
    np.testing.assert_array_equal(np.concatenate(asked), result.x)
    np.testing.assert_array_equal(result.labels, oracle(result.x))
    np.testing.assert_array_equal(result.x[:30], X)


def test_the_last_round_asks_nothing_and_a_limit_holds():
    assert train(oracle, X, rounds=1, epochs=1).queries == 30
    result = train(oracle, X, rounds=4, epochs=1, at_most=40)
    assert 30 + 30 + 40 < result.queries <= 30 + 30 + 40 + 40


def test_points_are_made_by_the_sign_of_the_gradient_of_their_label():
    result = train(oracle, X, rounds=2, epochs=3, step_size=0.2)
    before = train(oracle, X, rounds=1, epochs=3)

    def own(row, label):
        return jax.nn.softmax(NET.infer(before.params, before.stats, row[None])[0])[label]

    gradients = jax.vmap(jax.grad(own))(jnp.asarray(X), jnp.asarray(oracle(X)))
    np.testing.assert_allclose(result.x[30:], np.clip(X + 0.2 * np.sign(gradients), 0, 1), atol=1e-6)


def test_the_box_is_kept():
    result = train(oracle, X, rounds=3, epochs=1, step_size=0.4, lower=-0.1, upper=1.2)
    assert result.x.min() == np.float32(-0.1)
    assert result.x.max() == np.float32(1.2)
    with pytest.raises(
        ValueError, match=r"substitute takes rows inside the threat's box \[0.0, 1.0\], got values from"
    ):
        train(oracle, 255 * X)


def test_it_learns_the_oracle_and_its_adversarial_examples_fool_it():
    test = np.random.default_rng(2).uniform(size=(200, 6)).astype(np.float32)
    result = train(oracle, X, rounds=4, epochs=20)
    model = NET.logits_fn(result.params, result.stats)
    untrained = NET.logits_fn(*NET.init(KEY, jnp.asarray(X)))
    assert agreement(model, oracle, test) > 0.8 > agreement(untrained, oracle, test)
    attack = partial(jn.attacks.fgsm, threat=jn.Linf(0.2))
    x_adv = np.asarray(attack(KEY, model, jnp.asarray(test), jnp.asarray(oracle(test))))
    noise = np.clip(test + 0.2 * np.sign(np.random.default_rng(3).normal(size=test.shape)), 0, 1)
    fooled, by_noise = (np.mean(oracle(x.astype(np.float32)) != oracle(test)) for x in (x_adv, noise))
    assert fooled > 0.6
    assert fooled > 1.5 * by_noise


def test_the_same_key_gives_the_same_substitute():
    one, again = (train(oracle, X, rounds=2, epochs=2) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    other = substitute(jax.random.key(1), oracle, X, NET, optax.adam(0.01), rounds=2, epochs=2, batch_size=10)
    assert (other.x[30:] != one.x[30:]).any()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda x: (x - 0.5) @ NORMALS, "pass the argmax"),
        (lambda x: oracle(x)[:5], "one integer class for each of 30 rows"),
        (lambda x: oracle(x) / 1.0, "one integer class"),
    ],
)
def test_an_oracle_returns_labels(bad, words):
    with pytest.raises(ValueError, match=words):
        train(bad, X)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"epochs": 0}, {"batch_size": 31}, {"at_most": 0}])
def test_bad_settings_raise(settings):
    with pytest.raises(ValueError, match=r"at least 1 and batch_size in 1\.\.30"):
        train(oracle, X, **settings)


def test_agreement_takes_no_more_rows_at_once_than_an_attack():
    seen = set()

    def counting(x):
        seen.add(len(x))
        return jnp.stack([1 - x[:, 0], x[:, 0]], axis=1)

    test = np.random.default_rng(4).uniform(size=(300, 6)).astype(np.float32)
    ours = agreement(counting, lambda x: (x[:, 0] > 0.5).astype(np.int64), test)
    assert ours == 1
    assert max(seen) == jn.parallel.rows_at_once() < 300
