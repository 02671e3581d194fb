"""Models that draw, and the mean gradient over their draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.diversity import diversified, shrunk
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.stochastic import Stochastic, expected_logits, redrawn

KEY = jax.random.key(0)
cross_entropy = jn.losses.cross_entropy


def noisy_logits(weights, spread, key, x):
    return jnp.tanh(x + spread * jax.random.normal(key, x.shape)) @ weights


def noisy(samples, spread=0.5, seed=0):
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 3)), jnp.float32)
    return Stochastic(Partial(noisy_logits, weights, spread), KEY, samples)


def data(count=7):
    random = np.random.default_rng(1)
    return jnp.asarray(random.uniform(size=(count, 5)), jnp.float32), jnp.asarray(random.integers(0, 3, count))


def test_gradient_is_the_mean_over_draws():
    x, y = data()
    model = redrawn(noisy(6), row_keys(KEY, 7), 3)
    gradient, logits = jax.jit(input_gradient, static_argnums=1)(model, cross_entropy, x, y)
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(6)))(model.key)

    def one(key, row, label):
        logits = model.model(key, row[None])[0]
        return cross_entropy(logits, label), logits

    each = jax.vmap(jax.vmap(jax.grad(one, argnums=1, has_aux=True), (0, None, None)))
    gradients, each_logits = each(keys, x, y)
    assert jnp.abs(gradients - gradients[:, :1]).max() > 1e-2
    np.testing.assert_allclose(gradient, gradients.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(logits, each_logits.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(expected_logits(model, x), logits, atol=1e-5)


def test_draws_differ_by_row_step_and_draw_and_hang_on_nothing_else():
    x, _ = data()
    same = jnp.broadcast_to(x[:1], x.shape)
    keys = row_keys(KEY, 7)
    results = [redrawn(noisy(1), keys, step)(same) for step in (0, 1)]
    results += [redrawn(noisy(1), keys, 0).draw(number, 7)(same) for number in (0, 1)]
    assert len(np.unique(np.round(np.concatenate(results), 5), axis=0)) == 28
    np.testing.assert_allclose(redrawn(noisy(1), keys[2:4], 1)(x[2:4]), redrawn(noisy(1), keys, 1)(x)[2:4], atol=1e-6)
    np.testing.assert_array_equal(noisy(1)(x), noisy(1)(x))
    plain = lambda x: x  # noqa: E731
    assert redrawn(plain, keys, 0) is plain


@pytest.mark.slow
def test_rows_of_an_attack_do_not_see_each_other():
    x, y = data()
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.2), steps=3)
    whole = attack(row_keys(KEY, 7), noisy(3), x, y)
    for rows in (1, 4):
        first = attack(row_keys(KEY, 7)[:rows], noisy(3), x[:rows], y[:rows])
        np.testing.assert_allclose(first, whole[:rows], atol=1e-5)
    assert jnp.abs(whole - attack(row_keys(jax.random.key(1), 7), noisy(3), x, y)).max() > 1e-3


def test_more_draws_make_a_stronger_attack():
    """The signal of each coordinate is a fraction of the noise in its gradient."""

    def model(weights, key, x):
        shaken = weights + 3 * jax.random.normal(key, weights.shape)
        return jnp.concatenate([jnp.zeros((len(x), 1)), x @ shaken[:, None]], axis=1)

    weights = jnp.asarray(np.random.default_rng(0).choice([-0.7, 0.7], 40), jnp.float32)
    x, y = jnp.full((30, 40), 0.5), jnp.zeros(30, jnp.int32)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=10, loss=jn.losses.margin, start=jn.attacks.at_clean)
    gains = {}
    for samples in (1, 32):
        x_adv = attack(KEY, Stochastic(Partial(model, weights), KEY, samples), x, y)
        gains[samples] = float(((x_adv - x) @ weights).mean())
    assert gains[32] > 1.5 * gains[1]
    assert gains[32] > 0.7 * 0.1 * 0.7 * 40


def test_new_numbers_mean_no_new_trace():
    traces = []

    def model(by, key, x):
        traces.append(0)
        return x * by + jax.random.normal(key, x.shape)

    x, y = data()
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.2), steps=3)
    attack(KEY, Stochastic(Partial(model, 1.0), KEY, 2), x, y)
    first = len(traces)
    attack(KEY, Stochastic(Partial(model, 2.0), jax.random.key(1), 2), x, y)
    assert 0 < first == len(traces)


def test_no_draws_raise():
    with pytest.raises(ValueError, match="at least one draw, got samples=0"):
        Stochastic(lambda key, x: x, KEY, 0)


# Input diversity.


def flat(x):
    return x.reshape(len(x), -1)


def test_shrunk_images_are_padded_with_zeros_and_keep_their_middle():
    image = jnp.ones((12, 10, 2))
    np.testing.assert_allclose(shrunk(KEY, image, 1.0), image, atol=1e-6)
    areas, corners = [], set()
    for key in jax.random.split(KEY, 20):
        result = np.asarray(shrunk(key, image, 0.5))
        inside = result[:, :, 0] > 0
        rows, columns = inside.any(axis=1), inside.any(axis=0)
        assert inside.sum() == rows.sum() * columns.sum()
        np.testing.assert_allclose(result[inside], 1.0, atol=1e-5)
        areas.append(inside.mean())
        corners.add((rows.argmax(), columns.argmax()))
    assert 0.2 < min(areas) < 0.45
    assert max(areas) > 0.7
    assert len(corners) > 5


def test_diversity_by_probability_and_row():
    x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, size=(40, 6, 6, 1)), jnp.float32)
    changed = lambda p: (jnp.abs(diversified(flat, p, 0.7)(x) - flat(x)).max(axis=1) > 1e-3).mean()  # noqa: E731
    assert (changed(0.0), changed(1.0)) == (0.0, 1.0)
    assert 0.25 < changed(0.5) < 0.75
    drawn = diversified(flat, 1.0, 0.7)(jnp.broadcast_to(x[:1], x.shape))
    assert len(np.unique(np.round(drawn, 4), axis=0)) == 40


@pytest.mark.slow
def test_diversity_of_a_model_that_draws_and_of_rows_that_are_no_images():
    shaken = Stochastic(lambda key, x: flat(x) + jax.random.normal(key, (len(x), 36)), KEY)
    x = jnp.ones((3, 6, 6, 1))
    result = diversified(shaken, 0.0, 0.9)(x) - 1
    assert jnp.abs(result[0] - result[1]).min() > 1e-4
    with pytest.raises(ValueError, match="images"):
        diversified(flat)(jnp.ones((3, 6)))


def test_results_are_judged_by_draws_that_no_attack_has_seen():
    """A coin turns the gradient: FGSM is right about the coin that it saw, and about every second other one."""

    def model(key, x):
        lead = jax.random.rademacher(key, (), x.dtype) * (x[:, 0] - 0.5) + 0.05
        return jnp.stack([lead, -lead], axis=1)

    x, y = np.full((500, 1), 0.5, np.float32), np.zeros(500, np.int32)
    attack = {"fgsm": partial(jn.attacks.fgsm, threat=jn.Linf(0.1))}
    survived = jn.evaluation.evaluate(KEY, Stochastic(model, KEY), x, y, attack, threat=jn.Linf(0.1)).accuracies()
    assert 0.4 < survived["fgsm"] < 0.6


def test_what_a_model_draws_is_none_of_what_an_attack_draws():
    """A split of a key is its first foldings: a start drawn by one of these would lie along the model's noise."""
    key = row_keys(KEY, 1)
    for step in (0, 1):
        drawn_with = jax.random.key_data(redrawn(noisy(1), key, step).key)
        for count in (2, 3):
            assert not (jax.random.key_data(jax.random.split(key[0], count)) == drawn_with).all(axis=1).any()
