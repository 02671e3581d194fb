"""Restarts in one call or many, rising epsilons, and models that draw."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.combinators import eight_bit, escalate, restarts, worst_of
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.stochastic import Stochastic

KEY = jax.random.key(0)
margin = jn.losses.margin


def bumpy(count=24, seed=0):
    """A model with many maxima of its margin, rows and the classes that it gives them."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.uniform(size=(count, 6)), jnp.float32)
    first, second = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((6, 12), (12, 4)))
    logits_fn = Partial(lambda a, b, x: jnp.sin(5 * x @ a) @ b, first, second)
    return logits_fn, x, jnp.argmax(logits_fn(x), axis=1)


def test_runs_that_share_a_call_give_the_same_result():
    logits_fn, x, y = bumpy()
    attack = partial(jn.attacks.pgd, threat=jn.Linf(jnp.linspace(0.01, 0.04, 24)), steps=2)
    expected = restarts(attack, 5)(KEY, logits_fn, x, y)
    for at_once in (2, 5, 9):
        np.testing.assert_allclose(restarts(attack, 5, at_once=at_once)(KEY, logits_fn, x, y), expected, atol=1e-6)
    assert jnp.abs(expected - restarts(attack, 4)(KEY, logits_fn, x, y)).max() > 1e-3


@pytest.mark.slow
def test_shared_calls_work_with_a_model_that_draws():
    logits_fn, x, y = bumpy()
    noisy = Stochastic(Partial(lambda f, key, x: f(x + 0.05 * jax.random.normal(key, x.shape)), logits_fn), KEY, 2)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.03), steps=2)
    expected = restarts(attack, 4)(KEY, noisy, x, y)
    np.testing.assert_allclose(restarts(attack, 4, at_once=2)(KEY, noisy, x, y), expected, atol=1e-5)
    first = restarts(attack, 4)(row_keys(KEY, 24)[:7], noisy, x[:7], y[:7])
    np.testing.assert_allclose(first, expected[:7], atol=1e-5)


def test_a_lucky_draw_does_not_decide_which_point_is_worst():
    """Of two points one is wrong in 1 draw of 8, the other in 7: judged by the mean over draws, of their own."""
    share = lambda x: jnp.where(x > 0.5, 7 / 8, 1 / 8)  # noqa: E731

    def model(key, x):
        wrong = jax.random.uniform(key, x.shape) < share(x)
        return jnp.concatenate([jnp.zeros_like(x), jnp.where(wrong, 1.0, -1.0)], axis=1)

    noisy, x, y = Stochastic(model, KEY, samples=64), jnp.zeros((16, 1)), jnp.zeros(16, jnp.int32)
    go_to = lambda place, key, logits_fn, x, target: jnp.full_like(x, place)  # noqa: E731
    for places in ((0.0, 1.0), (1.0, 0.0)):
        np.testing.assert_array_equal(worst_of(*(partial(go_to, one) for one in places))(KEY, noisy, x, y), 1.0)


# Escalation.


def test_each_row_comes_from_the_smallest_epsilon_that_breaks_it():
    weights = jnp.array([[1.0, -1.0]])
    logits_fn = Partial(lambda w, x: jnp.concatenate([w[0, 0] * x, 1 - x], axis=1), weights)
    x, y = jnp.array([[0.4], [0.55], [0.68], [0.8], [1.0]]), jnp.zeros(5, jnp.int32)
    x_adv = escalate(jn.attacks.fgsm, jn.Linf(0.0), [0.1, 0.2, 0.31])(KEY, logits_fn, x, y)
    # Wrong already; broken by 0.1; by 0.2; by 0.31; by none.
    np.testing.assert_allclose(x - x_adv, [[0.0], [0.1], [0.2], [0.31], [0.31]], atol=1e-6)


def test_no_epsilon_is_tried_once_all_rows_are_broken():
    tried = []

    def attack(key, logits_fn, x, target, *, threat):
        jax.debug.callback(lambda e: tried.append(round(float(e), 3)), threat.epsilon)
        return jn.attacks.fgsm(key, logits_fn, x, target, threat=threat)

    logits_fn, x = (lambda x: jnp.concatenate([x, 1 - x], axis=1)), jnp.array([[0.55], [0.65]])
    escalated = escalate(attack, jn.Linf(0.0), (0.1, 0.2, 0.3, 0.4))
    x_adv = escalated(KEY, logits_fn, x, jnp.zeros(2, jnp.int32))
    jax.effects_barrier()
    assert tried == [0.1, 0.2]
    np.testing.assert_allclose(x - x_adv, [[0.1], [0.2]], atol=1e-6)
    tried.clear()
    np.testing.assert_array_equal(escalated(KEY, logits_fn, x, jnp.ones(2, jnp.int32)), x)
    jax.effects_barrier()
    assert not tried


@pytest.mark.parametrize("loss", [margin, jn.losses.targeted(margin)], ids=["untargeted", "targeted"])
def test_escalation_against_each_epsilon_by_itself(loss):
    logits_fn, x, y = bumpy()
    target = (y + 1) % 4 if jn.losses.is_targeted(loss) else y
    epsilons, attack = (0.02, 0.05, 0.1), partial(jn.attacks.pgd, steps=3, start=jn.attacks.at_clean, loss=loss)
    result = escalate(attack, jn.L2(0.0), epsilons)(KEY, logits_fn, x, target)
    done = jn.losses.succeeded(loss, logits_fn(x), target)
    expected = x
    for epsilon in epsilons:
        alone = attack(KEY, logits_fn, x, target, threat=jn.L2(epsilon))
        now = jn.losses.succeeded(loss, logits_fn(alone), target) & ~done
        expected, done = jnp.where(now[:, None], alone, expected), done | now
    assert 3 < done.sum() < 24
    np.testing.assert_allclose(result[done], expected[done], atol=1e-5)
    references.assert_inside(jn.L2(0.1), result, x)
    first = escalate(attack, jn.L2(0.0), epsilons)(row_keys(KEY, 24)[:5], logits_fn, x[:5], target[:5])
    np.testing.assert_allclose(first, result[:5], atol=1e-5)


def test_bad_arguments_raise():
    for epsilons in ((), (0.2, 0.1), (0.1, 0.1), (-0.1, 0.2), 0.3):
        with pytest.raises(ValueError, match="rising epsilons"):
            escalate(jn.attacks.fgsm, jn.Linf(0.0), epsilons)
    with pytest.raises(ValueError, match="at_once=0"):
        restarts(jn.attacks.pgd, 3, at_once=0)


# The smallest perturbation.


def test_the_nearest_of_minimum_norm_attacks_and_of_their_restarts_is_kept():
    logits_fn, x, y = bumpy()
    free = jn.L2(jnp.inf)
    fab = partial(jn.attacks.fab, threat=jn.L2(0.5), steps=4, start=jn.attacks.halfway)

    def found(attack):
        sizes = jn.threats.sizes(free, attack(KEY, logits_fn, x, y), x)
        return jnp.where(sizes > 0, sizes, jnp.inf)

    one, nearest, furthest = found(restarts(fab, 1)), found(restarts(fab, 4, nearest=free)), found(restarts(fab, 4))
    broken = jnp.isfinite(one)
    assert broken.mean() > 0.8
    assert (nearest <= one + 1e-6).all()
    assert (nearest < 0.99 * one)[broken].any()
    assert (furthest > 1.01 * nearest)[broken].any(), "by margin the furthest is kept"


# Eight bits.


def pixels(x):
    return 255 * np.asarray(x, np.float64)


def test_eight_bits_are_the_next_ones_towards_the_clean_row():
    x = jnp.array([[10, 10, 10, 10, 10, 10.5]]) / 255
    moved = jnp.array([[12.9, 12.0, 10.9, 7.1, 0.0, 10.7]]) / 255
    found = eight_bit(lambda key, logits_fn, x, target: moved)(KEY, lambda x: x, x, jnp.array([0]))
    np.testing.assert_allclose(pixels(found), [[12, 12, 10, 8, 0, 10.5]], atol=1e-4)


@pytest.mark.parametrize("threat", [jn.Linf(8 / 255), jn.Linf(0.031), jn.L2(0.2), jn.L1(0.5)], ids=repr)
def test_eight_bits_stay_inside_and_lose_little(threat):
    logits_fn, x, y = bumpy()
    x = jnp.round(255 * x) / 255
    attack = partial(jn.attacks.pgd, threat=threat, steps=10)
    free, held = (margin(logits_fn(a(KEY, logits_fn, x, y)), y) for a in (attack, eight_bit(attack)))
    found = eight_bit(attack)(KEY, logits_fn, x, y)
    np.testing.assert_allclose(pixels(found), np.round(pixels(found)), atol=1e-4)
    references.assert_inside(threat, found, x)
    clean = margin(logits_fn(x), y)
    assert jnp.mean(held - clean) > 0.8 * jnp.mean(free - clean)


def test_eight_bits_keep_the_count_of_queries():
    logits_fn, x, y = bumpy()
    attack = partial(jn.attacks.nes, threat=jn.Linf(0.1), samples=4, queries=30, sigma=0.1, step_size=0.05)
    expected = jn.attacks.with_queries(attack)(KEY, logits_fn, x, y).queries
    np.testing.assert_array_equal(jn.attacks.with_queries(eight_bit(attack))(KEY, logits_fn, x, y).queries, expected)


@pytest.mark.parametrize("wrap", [
    eight_bit,
    pytest.param(lambda attack: jax.jit(attack, static_argnums=1), marks=pytest.mark.slow),
    pytest.param(Partial, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_wrapped_attack_keeps_its_goal(wrap):
    logits_fn, x, y = bumpy()
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.05), steps=2, loss=jn.losses.targeted(jn.losses.cross_entropy))
    combined = restarts(wrap(attack), 3)
    assert jn.losses.is_targeted(combined.loss)
    wanted = (y + 1) % 4
    np.testing.assert_allclose(restarts(wrap(attack), 3, loss=jn.losses.targeted(margin))(KEY, logits_fn, x, wanted),
                               combined(KEY, logits_fn, x, wanted))  # fmt: skip
