"""Carlini and Wagner's attacks, and the search for constants that other attacks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.carlini_wagner import carlini_wagner, shrinking_cap
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.penalty import binary_search
from jaxnets.attacks.parts.stochastic import Stochastic

KEY = jax.random.key(0)
margin, targeted = jn.losses.margin, jn.losses.targeted
L2, LINF = jn.L2(jnp.inf), jn.Linf(jnp.inf)
each_norm = pytest.mark.parametrize("threat", [L2, LINF], ids=["L2", "Linf"])


def linear(weights, bias, x):
    return x.reshape(len(x), -1) @ weights + bias


SHORT = {"steps": 40, "step_size": 0.05, "rounds": 7, "initial_const": 0.01}


def tilted(n=10, rows=6):
    """Rows at distances 0.05 to 0.15 from the boundary of a linear model, their labels and leads, and its normal."""
    random = np.random.default_rng(0)
    weights, x = random.normal(size=(n, 2)), random.uniform(0.4, 0.6, size=(rows, n))
    normal, bias = weights[:, 1] - weights[:, 0], -0.5 * weights.sum(axis=0)
    y = np.arange(rows) % 2
    lead = np.linspace(0.05, 0.15, rows) * np.linalg.norm(normal)
    x += ((np.where(y == 1, lead, -lead) - (x - 0.5) @ normal) / (normal @ normal))[:, None] * normal
    logits_fn = Partial(linear, jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y), logits_fn, lead, normal


def curved(seed=0, n=6, classes=4):
    random = np.random.default_rng(seed)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((n, 16), (16, classes))]
    logits_fn = Partial(lambda a, b, x: jnp.tanh(x.reshape(len(x), -1) @ a) @ b, *arrays)
    x = jnp.asarray(np.clip(random.uniform(-0.3, 1.3, size=(8, n)), 0, 1), jnp.float32)
    return x, jnp.argmax(logits_fn(x), axis=1), logits_fn


@each_norm
def test_nearest_boundary_of_a_linear_model(threat):
    x, y, logits_fn, gap, w = tilted()
    x_adv = carlini_wagner(KEY, logits_fn, x, y, threat=threat, steps=300, step_size=0.002)
    order = references.ORDERS[type(threat).__name__]
    ratio = references.norm(order, x_adv - x) / (gap / np.linalg.norm(w, references.dual(order)))
    assert (jnp.argmax(logits_fn(x_adv), axis=1) != y).all()
    assert ratio.min() > 1 - 1e-3
    assert ratio.max() < 1.05, ratio


@each_norm
def test_targeted_reaches_the_wanted_class_and_only_that_counts(threat):
    x, y, logits_fn = curved()
    wanted = (y + 1) % 4
    x_adv = carlini_wagner(KEY, logits_fn, x, wanted, threat=threat, loss=targeted(margin), **SHORT)
    there = jnp.argmax(logits_fn(x_adv), axis=1) == wanted
    assert there.sum() >= 6
    np.testing.assert_array_equal(x_adv[~there], x[~there])
    references.assert_inside(threat, x_adv, x)
    # Where the wanted class is the predicted one already, nothing needs to change.
    same = carlini_wagner(KEY, logits_fn, x, y, threat=threat, loss=targeted(margin), **SHORT)
    np.testing.assert_array_equal(same, x)


@each_norm
def test_black_and_white_pixels_move(threat):
    """Trap 8: from a face of the box the tanh has no way back."""
    x = jnp.concatenate([jnp.zeros((2, 8)), jnp.ones((2, 8))], axis=1)
    signs = jnp.concatenate([jnp.ones(8), -jnp.ones(8)])
    lean = Partial(lambda signs, x: jnp.stack([1 - (x @ signs + 8), x @ signs + 8], axis=1), signs)
    x_adv = carlini_wagner(KEY, lean, x, jnp.zeros(2, jnp.int32), threat=threat, steps=30)
    moved = np.abs(np.asarray(x_adv - x))
    assert (jnp.argmax(lean(x_adv), axis=1) == 1).all()
    np.testing.assert_allclose(moved, 1 / 32, rtol=0.15)


@pytest.mark.slow
@each_norm
def test_rows_do_not_see_each_other_and_jit_equals_eager(threat):
    x, y, logits_fn = curved()
    keys = row_keys(KEY, 8)
    whole = carlini_wagner(keys, logits_fn, x, y, threat=threat, **SHORT)
    assert (jnp.argmax(logits_fn(whole), axis=1) != y).sum() >= 5
    for rows in (1, 7):
        part = carlini_wagner(keys[:rows], logits_fn, x[:rows], y[:rows], threat=threat, **SHORT)
        np.testing.assert_allclose(part, whole[:rows], rtol=0, atol=1e-4)
    jitted = jax.jit(lambda f, x: carlini_wagner(keys, f, x, y, threat=threat, **SHORT))(logits_fn, x)
    np.testing.assert_allclose(jitted, whole, rtol=0, atol=1e-4)


@each_norm
def test_epsilon_keeps_what_is_near_and_returns_the_clean_row_for_the_rest(threat):
    x, y, logits_fn = curved()
    free = carlini_wagner(KEY, logits_fn, x, y, threat=threat, **SHORT)
    size = np.asarray(jn.threats.sizes(threat, free, x))
    epsilon = float(np.median(size))
    held = carlini_wagner(KEY, logits_fn, x, y, threat=type(threat)(epsilon), **SHORT)
    near = size <= epsilon
    assert 0 < near.sum() < 8
    # The search does not depend on epsilon.
    np.testing.assert_allclose(held[near], free[near], rtol=0, atol=1e-5)
    references.assert_inside(type(threat)(epsilon), held, x)
    np.testing.assert_array_equal(carlini_wagner(KEY, logits_fn, x, y, threat=type(threat)(0.0), **SHORT), x)


@each_norm
def test_models_that_give_nothing_to_go_by(threat):
    x, y, logits_fn = curved()
    constant = carlini_wagner(
        KEY, lambda x: jnp.zeros((len(x), 4)), x, jnp.zeros(8, jnp.int32), threat=threat, steps=20
    )
    np.testing.assert_array_equal(constant, x)
    broken = carlini_wagner(KEY, lambda x: jnp.full((len(x), 4), jnp.nan), x, y, threat=threat, steps=20)
    np.testing.assert_array_equal(broken, x)
    wrong = carlini_wagner(KEY, logits_fn, x, (y + 1) % 4, threat=threat, steps=20)
    np.testing.assert_array_equal(wrong, x)


def test_confidence_is_the_lead_of_the_result():
    x, y, logits_fn, _, _ = tilted()
    for confidence in (0.0, 0.2):
        x_adv = carlini_wagner(KEY, logits_fn, x, y, threat=L2, steps=100, confidence=confidence)
        lead = margin(logits_fn(x_adv), y)
        assert (lead >= confidence - 1e-5).all()
        assert (lead < confidence + 0.05).all()


def test_other_units_of_the_data_give_the_same_attack():
    x, y, logits_fn = curved()
    there, back = (lambda x: 40 * x - 10), (lambda x: (x + 10) / 40)
    plain = carlini_wagner(KEY, logits_fn, x, y, threat=L2, steps=60)
    scaled = carlini_wagner(
        KEY, lambda z: logits_fn(back(z)), there(x), y, threat=jn.L2(jnp.inf, lower=-10.0, upper=30.0), steps=60
    )
    sizes = references.norm(2, plain - x), references.norm(2, scaled - there(x)) / 40
    np.testing.assert_allclose(*sizes, rtol=0.03)


def test_new_numbers_mean_no_new_trace():
    x, y, _ = curved()
    traces = []

    def counted(weights, x):
        traces.append(0)
        return jnp.tanh(x) @ weights

    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    carlini_wagner(KEY, Partial(counted, weights), x, y, threat=jn.L2(1.0), steps=5)
    first = len(traces)
    options = {"steps": 7, "step_size": 0.02, "confidence": 0.1, "initial_const": 0.1, "rounds": 2, "tolerance": -1.0}
    carlini_wagner(KEY, Partial(counted, 2 * weights), 1 - x, y, threat=jn.L2(2.0), **options)
    assert len(traces) == first


def test_double_precision_stays_double_and_single_single(x64):
    x, y, logits_fn = curved()
    for dtype in (jnp.float32, jnp.float64):
        x_adv = carlini_wagner(KEY, logits_fn, x.astype(dtype), y, threat=L2, steps=5, rounds=2)
        assert x_adv.dtype == dtype


def test_binary_search_by_hand():
    search = binary_search(0.1, 4)
    bracket, consts = search.init(jnp.float32), []
    for found in (False, True, False, True):
        consts.append(float(bracket.const))
        assert not search.done(bracket)
        bracket = search.after(bracket, jnp.asarray(found), jnp.zeros(()))
    np.testing.assert_allclose(consts, [0.1, 1.0, 0.55, 0.775], rtol=1e-6)
    assert search.done(bracket)


def test_shrinking_cap_by_hand():
    search = shrinking_cap(1e-5, 100)
    cap = search.init(jnp.float32)
    np.testing.assert_allclose(search.penalty(cap._replace(tau=0.2), jnp.array([0.5, -0.3, 0.1])), 0.4, rtol=1e-6)
    cap = search.after(cap, jnp.asarray(True), jnp.float32(0.5))
    np.testing.assert_allclose(cap[:2], [1e-5, 0.45], rtol=1e-6)
    cap = search.after(cap, jnp.asarray(False), jnp.float32(0.8))
    np.testing.assert_allclose(cap[:2], [2e-5, 0.45], rtol=1e-6)
    assert search.done(cap._replace(const=jnp.float32(21.0)))
    assert search.done(cap._replace(tau=jnp.float32(0.003)))
    assert not search.done(cap)


def test_bad_arguments_raise():
    x, y, logits_fn = curved()
    with pytest.raises(ValueError, match="supports the threats L2 and Linf, got L1"):
        carlini_wagner(KEY, logits_fn, x, y, threat=jn.L1(1.0))
    for name in ("steps", "rounds"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {name}=0"):
            carlini_wagner(KEY, logits_fn, x, y, threat=L2, **{name: 0})
    with pytest.raises(ValueError, match="confidence must be a scalar"):
        carlini_wagner(KEY, logits_fn, x, y, threat=L2, confidence=jnp.zeros(3))


@pytest.mark.parametrize("loss", [jn.losses.cross_entropy, jn.losses.targeted(jn.losses.cross_entropy)])
def test_a_loss_without_a_sign_is_refused(loss):
    x, y = jnp.full((2, 3), 0.5), jnp.zeros(2, int)
    with pytest.raises(ValueError, match="margin or targeted"):
        jn.attacks.carlini_wagner(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(1.0), loss=loss)


@pytest.mark.slow
def test_a_row_of_a_random_model_does_not_see_its_batch():
    x, y, logits_fn = curved()
    noisy = Stochastic(Partial(lambda f, key, x: f(x) + 0.1 * jax.random.normal(key, (len(x), 4)), logits_fn), KEY)
    keys = row_keys(KEY, 8)
    whole = carlini_wagner(keys, noisy, x, y, threat=L2, **SHORT)
    for row in range(3):
        alone = slice(row, row + 1)
        found = carlini_wagner(keys[alone], noisy, x[alone], y[alone], threat=L2, **SHORT)
        np.testing.assert_allclose(found, whole[alone], atol=1e-5)


@pytest.mark.parametrize(("attack", "threat", "settings", "words"), [
    (carlini_wagner, jn.L2(jnp.inf), {"initial_const": 0.0}, "initial_const must be above 0 and below inf, got 0"),
    (carlini_wagner, jn.Linf(jnp.inf), {"initial_const": -1}, "initial_const must be above 0 and below inf, got -1"),
    (carlini_wagner, jn.Linf(jnp.inf), {"shrink": 1.5}, "shrink must be above 0 and below 1, got 1.5"),
    (carlini_wagner, jn.L2(jnp.inf), {"step_size": jnp.ones(8)}, r"step_size must be one number for all rows, got.*8"),
    (jn.attacks.ead, jn.L1(jnp.inf), {"initial_const": 0}, "initial_const must be above 0"),
    (jn.attacks.ead, jn.L1(jnp.inf), {"beta": jnp.ones(8)}, "beta must be one number for all rows"),
    (jn.attacks.lbfgs, jn.L2(jnp.inf), {"initial_const": 0}, "initial_const must be above 0"),
    (jn.attacks.fab, jn.L2(1.0), {"eta": np.ones(8)}, "eta must be one number for all rows"),
    (jn.attacks.deepfool, jn.L2(1.0), {"overshoot": np.ones(8)}, "overshoot must be one number for all rows"),
    (jn.attacks.jsma, jn.L0(4), {"step_size": 0.0}, "step_size, which must not be 0, got 0.0"),
])  # fmt: skip
def test_settings_that_find_nothing_or_are_of_single_rows_raise(attack, threat, settings, words):
    """With them every row came back clean, which looks like robustness; or they were taken coordinate by coordinate."""
    x, y, logits_fn = curved()
    with pytest.raises(ValueError, match=words):
        attack(KEY, logits_fn, x, y, threat=threat, **settings)
