"""Attacks by their papers' names: what each composes, and what all of them promise on images."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from references import assert_inside

import jaxnets as jn
from jaxnets.attacks import iterated
from jaxnets.attacks.diversity import diversified
from jaxnets.attacks.parts import rules
from jaxnets.attacks.parts.calling import row_keys

KEY = jax.random.key(0)
cross_entropy, margin = jn.losses.cross_entropy, jn.losses.margin


def tanh_logits(scale, first, second, x):
    return scale * jnp.tanh(x.reshape(len(x), -1) @ first) @ second


def model(scale=1.0, seed=0, classes=4):
    random = np.random.default_rng(seed)
    arrays = (random.normal(size=shape) / 3 for shape in ((32, 9), (9, classes)))
    return Partial(tanh_logits, jnp.float32(scale), *(jnp.asarray(one, jnp.float32) for one in arrays))


def images(count=8):
    random = np.random.default_rng(0)
    x = np.clip(random.uniform(-0.3, 1.3, size=(8, 4, 4, 2)), 0, 1)
    return jnp.asarray(x[:count], jnp.float32), jnp.asarray(random.integers(0, 4, 8)[:count])


STEPS = {"steps": 3}
ATTACKS = {
    "bim": partial(iterated.bim, **STEPS),
    "least_likely_class": iterated.least_likely_class,
    "iterated_least_likely_class": partial(iterated.iterated_least_likely_class, **STEPS),
    "mi_fgsm": partial(iterated.mi_fgsm, **STEPS),
    "ni_fgsm": partial(iterated.ni_fgsm, **STEPS),
    "di_fgsm": partial(iterated.di_fgsm, decay=1.0, **STEPS),
    "ti_fgsm": partial(iterated.ti_fgsm, kernel=rules.gaussian_kernel(3), **STEPS),
    "adam_pgd": partial(iterated.adam_pgd, **STEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_what_every_attack_promises(name):
    """Inside the threat, the same in any batch, no trace for new numbers, steps that no scale of the logits changes."""

    def attack(threat, key, logits_fn, x, y):
        return ATTACKS[name](key, logits_fn, x, y, threat=threat, loss=margin)

    attack.__name__ = name
    x, y = images()
    keys, compiled = row_keys(KEY, 8), jax.jit(chex.assert_max_traces(attack, n=2))
    whole = compiled(jn.Linf(0.1), keys, model(), x, y)
    assert_inside(jn.Linf(0.1), whole, x)
    assert (whole.dtype, whole.shape) == (x.dtype, x.shape)
    assert (jnp.abs(whole - x).max(axis=(1, 2, 3)) > 0.05).sum() >= 6
    for scale in (1e-20, 1e20):
        np.testing.assert_allclose(compiled(jn.Linf(0.1), keys, model(scale), x, y), whole, atol=1e-5)
    np.testing.assert_array_equal(compiled(jn.Linf(0.0), keys, model(), x, y), x)
    assert_inside(jn.Linf(0.2), compiled(jn.Linf(0.2), keys, model(scale=0.0), x, y), x)
    assert_inside(jn.Linf(0.2), compiled(jn.Linf(0.2), keys, model(scale=jnp.nan), x, y), x)
    first = compiled(jn.Linf(0.1), keys[2:5], model(), x[2:5], y[2:5])
    np.testing.assert_allclose(first, whole[2:5], atol=1e-5)
    eager = ATTACKS[name](KEY, model(), x, y, threat=jn.Linf(0.1), loss=margin)
    np.testing.assert_allclose(eager, whole, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [jn.L2, jn.L1], ids=["L2", "L1"])
def test_other_norms(cls):
    x, y = images()
    # Adam moves all coordinates alike, which is not what L1 is about.
    for name in ("mi_fgsm", "ni_fgsm", "adam_pgd")[: 3 if cls is jn.L2 else 2]:
        x_adv = ATTACKS[name](KEY, model(), x, y, threat=cls(0.5), steps=10)
        assert_inside(cls(0.5), x_adv, x)
        gain = cross_entropy(model()(x_adv), y) - cross_entropy(model()(x), y)
        most = jn.attacks.pgd(KEY, model(), x, y, threat=cls(0.5), steps=10)
        assert gain.mean() > 0.7 * (cross_entropy(model()(most), y) - cross_entropy(model()(x), y)).mean()


def test_what_each_composes():
    x, y = images()
    run = lambda attack, **options: attack(KEY, model(), x, y, threat=jn.Linf(0.1), **STEPS, **options)  # noqa: E731
    pgd = partial(run, jn.attacks.pgd, start=jn.attacks.at_clean)
    np.testing.assert_allclose(run(iterated.bim), pgd(step_size=0.125 / 3), atol=1e-6)
    np.testing.assert_allclose(run(iterated.mi_fgsm, decay=0.0), pgd(step_size=0.1 / 3), atol=1e-6)
    np.testing.assert_allclose(run(iterated.di_fgsm, probability=0.0), pgd(step_size=0.1 / 3), atol=1e-6)
    np.testing.assert_allclose(run(iterated.ti_fgsm, kernel=jnp.ones((1, 1))), pgd(step_size=0.1 / 3), atol=1e-6)
    rule = rules.smoothed(rules.gaussian_kernel(3), rules.momentum(0.5))
    together = jn.attacks.pgd(
        KEY, diversified(model(), 0.7, 0.8), x, y, threat=jn.Linf(0.1), rule=rule, start=jn.attacks.at_clean,
        step_size=0.1 / 3, **STEPS,
    )  # fmt: skip
    options = {"threat": jn.Linf(0.1), "kernel": rules.gaussian_kernel(3), "decay": 0.5, **STEPS}
    composed = iterated.ti_fgsm(KEY, diversified(model(), 0.7, 0.8), x, y, **options)
    np.testing.assert_allclose(composed, together, atol=1e-6)
    assert jnp.abs(composed - run(iterated.ti_fgsm, kernel=rules.gaussian_kernel(3), decay=0.5)).max() > 1e-3


# Least likely class.


def test_the_step_goes_towards_the_least_likely_class_whatever_the_label():
    logits_fn, (x, _) = model(), images()
    order = jnp.argsort(logits_fn(x), axis=1)
    towards = jax.grad(lambda x: -cross_entropy(logits_fn(x), order[:, 0]).sum())(x)
    expected = jnp.clip(x + 0.1 * jnp.sign(towards), 0, 1)
    for label in (order[:, 1], order[:, 3]):
        x_adv = iterated.least_likely_class(KEY, logits_fn, x, label, threat=jn.Linf(0.1))
        np.testing.assert_allclose(x_adv, expected, atol=1e-6)
    # The label itself is never what is steered to.
    second = jax.grad(lambda x: -cross_entropy(logits_fn(x), order[:, 1]).sum())(x)
    x_adv = iterated.least_likely_class(KEY, logits_fn, x, order[:, 0], threat=jn.Linf(0.1))
    np.testing.assert_allclose(x_adv, jnp.clip(x + 0.1 * jnp.sign(second), 0, 1), atol=1e-6)


def test_success_is_any_wrong_class():
    """From class 0 towards 2 the way leads through 1: a step that ends there beats the clean row, and 2 beats 1."""
    logits_fn = lambda x: jnp.concatenate([1 - 3 * x, 0 * x, 4 * x - 3], axis=1)  # noqa: E731
    x, y = jnp.array([[0.2]]), jnp.array([0])
    attack = partial(iterated.iterated_least_likely_class, KEY, logits_fn, x, y, steps=4, step_size=0.2)
    assert jnp.argmax(logits_fn(attack(threat=jn.Linf(0.3)))) == 1
    assert jnp.argmax(logits_fn(attack(threat=jn.Linf(0.8)))) == 2
    np.testing.assert_allclose(attack(threat=jn.Linf(0.3)), [[0.5]], atol=1e-6)
    # Already wrong, of two classes: it is not led back.
    two = lambda x: jnp.concatenate([x, 1 - x], axis=1)  # noqa: E731
    wrong = iterated.iterated_least_likely_class(KEY, two, jnp.array([[0.4]]), jnp.array([0]), threat=jn.Linf(0.3))
    assert wrong[0, 0] <= 0.4


@pytest.mark.parametrize("name", ["bim", "mi_fgsm", "ni_fgsm", "ti_fgsm", "adam_pgd", "di_fgsm"])
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match="at least one step, got steps=0"):
        partial(ATTACKS[name], steps=0)(KEY, model(), *images(), threat=jn.Linf(0.1))


def test_adam_crosses_the_box_where_few_coordinates_may_move():
    """A share of their number would be hardly a step."""
    x, weights = jnp.full((1, 600), 0.5), np.random.default_rng(0).normal(size=(600, 2))
    attack = partial(iterated.adam_pgd, threat=jn.L0(2), steps=5, start=jn.attacks.at_clean)
    x_adv = np.asarray(attack(KEY, lambda x: x @ weights, x, jnp.array([0])))
    assert sorted(np.unique(np.abs(x_adv - 0.5))) == [0, 0.5]
