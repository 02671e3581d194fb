"""What attacks find: against linear models, constructed cases, and an implementation in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.parts.calling import row_keys

THREATS = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
cross_entropy, dlr, kl, margin, targeted = (
    jn.losses.cross_entropy, jn.losses.dlr, jn.losses.kl, jn.losses.margin, jn.losses.targeted,
)  # fmt: skip
WIDE = {"lower": -50.0, "upper": 50.0}
KEY = jax.random.key(0)


def linear(weights, x):
    return x @ weights


def rows_and_weights(seed, n, rows=6, classes=2):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, n)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(random.integers(0, classes, rows)), random.normal(size=(n, classes))


# The oracle: on a linear model the best gain is epsilon times the dual norm of the weights.


@every_threat
@pytest.mark.parametrize(("seed", "n"), [(0, 2), (1, 10), (3, 784)])
def test_gain_on_a_linear_model(cls, seed, n):
    x, y, weights = rows_and_weights(seed, n)
    epsilon, logits_fn = 0.5, Partial(linear, jnp.asarray(weights, jnp.float32))
    best = epsilon * np.linalg.norm(weights[:, 1] - weights[:, 0], references.dual(references.ORDERS[cls.__name__]))

    def gain(x_adv):
        moved = (np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)) @ (weights[:, 1] - weights[:, 0])
        return np.where(np.asarray(y) == 0, moved, -moved)

    threat = cls(epsilon, **WIDE)
    np.testing.assert_allclose(gain(jn.attacks.fgsm(KEY, logits_fn, x, y, threat=threat, loss=margin)), best, rtol=1e-5)
    # From a random start on the far side, twenty steps along a sphere do not go all the way round.
    for start, share in ((jn.attacks.at_clean, 0.97), (jn.attacks.uniform, 0.95)):
        x_adv = jn.attacks.pgd(KEY, logits_fn, x, y, threat=threat, steps=20, start=start, loss=margin)
        assert (gain(x_adv) >= share * best).all()
        assert (gain(x_adv) <= (1 + 1e-5) * best).all()


@every_threat
def test_targeted_gain_on_a_linear_model(cls):
    x, y, weights = rows_and_weights(4, 10)
    threat, loss = cls(0.5, **WIDE), targeted(margin)
    x_adv = jn.attacks.fgsm(KEY, Partial(linear, jnp.asarray(weights, jnp.float32)), x, y, threat=threat, loss=loss)
    difference = np.where(np.asarray(y) == 1, 1, -1)[:, None] * (weights[:, 1] - weights[:, 0])
    gain = ((np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)) * difference).sum(axis=1)
    best = 0.5 * np.linalg.norm(weights[:, 1] - weights[:, 0], references.dual(references.ORDERS[cls.__name__]))
    np.testing.assert_allclose(gain, best, rtol=1e-5)


# PGD, step by step, against numpy.


@pytest.mark.parametrize("sign", [1, -1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(("cls", "epsilon"), [(jn.Linf, 0.4), (jn.L2, 0.9)], ids=["Linf", "L2"])
def test_pgd_against_numpy_step_by_step(cls, epsilon, sign, x64):
    net = references.TanhMLP(seed=0, inputs=5, hidden=7, classes=3)
    random = np.random.default_rng(1)
    x, y = random.uniform(size=(6, 5)), random.integers(0, 3, 6)

    def logits(w1, b1, w2, b2, x):
        return jnp.tanh(x @ w1 + b1) @ w2 + b2

    logits_fn = Partial(logits, *map(jnp.asarray, net.arrays()))
    loss = cross_entropy if sign > 0 else targeted(cross_entropy)
    attack = partial(jn.attacks.pgd, threat=cls(epsilon), step_size=0.4 * epsilon, loss=loss, start=jn.attacks.at_clean)
    last_is_best = []
    for steps in (1, 2, 3, 6):
        result = attack(KEY, logits_fn, jnp.asarray(x), jnp.asarray(y), steps=steps)
        settings = {"epsilon": epsilon, "steps": steps, "step_size": 0.4 * epsilon, "lower": 0, "upper": 1}
        for row in range(len(x)):
            iterates, best = references.pgd(references.ORDERS[cls.__name__], net, x[row], y[row], sign=sign, **settings)
            np.testing.assert_allclose(result[row], best, rtol=0, atol=1e-8)
            last_is_best.append(np.array_equal(best, iterates[-1]))
    assert any(last_is_best)


def test_fgsm_is_one_step_of_pgd_and_its_result_is_the_step_even_where_it_harms():
    x, y, weights = rows_and_weights(0, 5)
    bumpy = Partial(lambda w, x: jnp.cos(9 * x) @ w, jnp.asarray(weights, jnp.float32))
    threat = jn.Linf(0.5, **WIDE)
    gradient = jax.grad(lambda x: cross_entropy(bumpy(x), y).sum())(x)
    result = jn.attacks.fgsm(KEY, bumpy, x, y, threat=threat)
    np.testing.assert_allclose(result, x + 0.5 * jnp.sign(gradient), atol=1e-6)
    gain = cross_entropy(bumpy(result), y) - cross_entropy(bumpy(x), y)
    assert gain.min() < 0 < gain.max()


def hill(top):
    """Logits of a model of one input whose margin for class 0 is ``-(x - top)^2 - 1``: always right."""
    return lambda x: jnp.concatenate([(x - top) ** 2 + 1, jnp.zeros_like(x)], axis=1)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0.65), (2, 0.65), (3, 0.65)])
def test_pgd_keeps_the_best_iterate(steps, expected):
    """The iterates are 0.5, 0.65, 0.5, 0.65 around the top at 0.6."""
    x, y = jnp.full((1, 1), 0.5), jnp.array([0])
    settings = {"threat": jn.Linf(0.3), "step_size": 0.15, "start": jn.attacks.at_clean, "loss": margin}
    assert abs(jn.attacks.pgd(KEY, hill(0.6), x, y, steps=steps, **settings)[0, 0] - expected) < 1e-6


def test_pgd_keeps_the_start_where_no_step_helps():
    x, y = jnp.full((1, 1), 0.5), jnp.array([0])
    settings = {"threat": jn.Linf(0.3), "step_size": 0.3, "start": jn.attacks.at_clean, "loss": margin}
    assert jn.attacks.pgd(KEY, hill(0.55), x, y, steps=1, **settings)[0, 0] == 0.5


def two_points(x):
    """Near 0: right, with a cross-entropy of 1.6. Near 1: wrong, with one of 0.7. The row's label is 0."""
    right = jnp.array([0.01, 0.0, 0.0, 0.0, 0.0])
    wrong = jnp.array([9.0, 9.1, 0.0, 0.0, 0.0])
    return jnp.where(x > 0.5, wrong, right)


def go_to(place, key, logits_fn, x, target):
    return jnp.full_like(x, place)


@pytest.mark.parametrize("places", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("loss", [cross_entropy, None])
def test_a_misclassified_point_beats_a_right_one_of_higher_loss(places, loss):
    x, y = jnp.zeros((1, 1)), jnp.array([0])
    ce = cross_entropy(two_points(jnp.array([[0.0], [1.0]])), jnp.array([0, 0]))
    assert ce[0] > ce[1]
    attack = jn.attacks.worst_of(*(partial(go_to, place) for place in places), loss=loss)
    assert attack(KEY, two_points, x, y)[0, 0] == 1.0


def test_pgd_prefers_a_misclassified_iterate_to_one_of_higher_loss():
    """Cross-entropy rises on the way back to the region where the row is classified rightly."""

    def logits(x):
        zero = jnp.zeros_like(x)
        right = jnp.concatenate([0.01 + zero, zero, zero, zero, zero], axis=1)
        wrong = jnp.concatenate([9 + 0.1 * x, 9.2 + zero, zero, zero, zero], axis=1)
        return jnp.where(x > 0.5, wrong, right)

    x, y = jnp.full((1, 1), 0.6), jnp.array([0])
    settings = {"threat": jn.Linf(0.6), "step_size": 0.15, "start": jn.attacks.at_clean, "steps": 1}
    moved = jn.attacks.fgsm(KEY, logits, x, y, threat=jn.Linf(0.6), step_size=0.15)
    assert moved[0, 0] < 0.5
    assert cross_entropy(logits(moved), y) > cross_entropy(logits(x), y)
    assert jn.attacks.pgd(KEY, logits, x, y, **settings)[0, 0] == x[0, 0]


def test_a_nan_loss_is_never_chosen():
    def logits(x):
        return jnp.where(x > 0.55, jnp.nan, jnp.concatenate([-x, x], axis=1))

    x, y = jnp.full((2, 1), 0.5), jnp.array([0, 1])
    result = jn.attacks.pgd(KEY, logits, x, y, threat=jn.Linf(0.2), steps=4, step_size=0.1, start=jn.attacks.at_clean)
    np.testing.assert_allclose(result, [[0.5], [0.3]], atol=1e-6)


# Restarts.


def wandering(key, logits_fn, x, target):
    """An attack that only draws."""
    return jn.attacks.uniform(row_keys(key, len(x)), jn.Linf(0.2), x)


def test_restarts_draw_other_keys_and_keep_the_worst_of_them():
    x, y = jnp.full((5, 1), 0.5), jnp.zeros(5, jnp.int32)
    logits_fn = lambda x: jnp.concatenate([jnp.zeros_like(x), x - 2], axis=1)  # noqa: E731
    keys = row_keys(KEY, 5)
    draws = [wandering(jax.vmap(jax.random.fold_in, (0, None))(keys, run), None, x, y) for run in range(6)]
    assert len(np.unique(np.stack(draws))) == 30
    for times in (1, 2, 6):
        result = jn.attacks.restarts(wandering, times)(KEY, logits_fn, x, y)
        np.testing.assert_allclose(result, np.max(draws[:times], axis=0), rtol=1e-6)


@pytest.mark.parametrize("is_targeted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_survivors_never_increase_with_restarts(is_targeted):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(size=(40, 6)), jnp.float32)
    first, second = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((6, 12), (12, 4)))
    logits_fn = Partial(lambda a, b, x: jnp.sin(5 * x @ a) @ b, first, second)
    loss = targeted(cross_entropy) if is_targeted else cross_entropy
    clean = jnp.argmax(logits_fn(x), axis=1)
    y = (clean + 1) % 4 if is_targeted else clean
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.06 if is_targeted else 0.02), steps=2, loss=loss)
    reached, counts = np.zeros(40, bool), []
    for times in (1, 2, 4, 8):
        # Ranked by cross-entropy as well, as many do: success comes first.
        x_adv = jn.attacks.restarts(attack, times, loss=loss)(KEY, logits_fn, x, y)
        now = np.asarray(jn.losses.succeeded(loss, logits_fn(x_adv), y))
        assert (now | ~reached).all(), "a restart undid a success"
        reached = now
        counts.append(now.sum())
    assert 0 < counts[0] < counts[-1] < 40


def test_worst_of_is_the_pointwise_worst():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(size=(30, 4)), jnp.float32)
    first = jnp.asarray(random.normal(size=(4, 3)), jnp.float32)
    logits_fn = Partial(lambda a, x: jnp.sin(4 * x @ a), first)
    y = jnp.argmax(logits_fn(x), axis=1)
    attacks = [partial(jn.attacks.fgsm, threat=cls(e)) for cls, e in ((jn.Linf, 0.15), (jn.L2, 0.3), (jn.L1, 0.4))]
    each = np.stack([margin(logits_fn(attack(KEY, logits_fn, x, y)), y) for attack in attacks])
    combined = margin(logits_fn(jn.attacks.worst_of(*attacks)(KEY, logits_fn, x, y)), y)
    np.testing.assert_allclose(combined, each.max(axis=0), atol=1e-5)
    assert len(set(each.argmax(axis=0))) > 1


# Targeted attacks.


def test_targeted_attacks_reach_their_class_and_success_is_being_there():
    random = np.random.default_rng(0)
    x, weights = jnp.asarray(random.uniform(size=(12, 6)), jnp.float32), jnp.eye(6, 4)
    logits_fn = Partial(linear, weights)
    wanted = (jnp.argmax(logits_fn(x), axis=1) + jnp.arange(12) % 4) % 4
    loss = targeted(cross_entropy)
    x_adv = jn.attacks.pgd(KEY, logits_fn, x, wanted, threat=jn.Linf(3.0, -9.0, 9.0), steps=10, loss=loss)
    np.testing.assert_array_equal(jnp.argmax(logits_fn(x_adv), axis=1), wanted)
    # Rows whose class is wanted already stay there, and are surer of it.
    stay = np.arange(12) % 4 == 0
    assert (margin(logits_fn(x_adv), wanted) < margin(logits_fn(x), wanted))[stay].all()


# KL, trap 1.


def test_kl_from_the_clean_point_does_not_move_and_from_a_random_start_does():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    x = jnp.full((5, 6), 0.5)
    logits_fn = Partial(lambda w, x: (x - 0.5) @ w, weights)
    reference = logits_fn(x)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=3, loss=kl)
    np.testing.assert_array_equal(attack(KEY, logits_fn, x, reference, start=jn.attacks.at_clean), x)
    assert (kl(logits_fn(attack(KEY, logits_fn, x, reference)), reference) > 1e-3).all()


def test_kl_from_the_clean_point_has_no_direction():
    """Elsewhere the gradient is not exactly zero, but nothing but rounding: one step gains what a random one does."""
    random = np.random.default_rng(0)
    weights = jnp.asarray(random.normal(size=(50, 10)), jnp.float32)
    x = jnp.asarray(random.uniform(0.3, 0.7, size=(40, 50)), jnp.float32)
    logits_fn = Partial(linear, weights)
    attack = partial(jn.attacks.fgsm, threat=jn.Linf(0.05), loss=kl)
    gains = [
        np.median(kl(logits_fn(attack(KEY, logits_fn, x, logits_fn(x), start=start)), logits_fn(x)))
        for start in (jn.attacks.at_clean, jn.attacks.uniform)
    ]
    assert gains[1] > 2 * gains[0]


# Fast adversarial training's random start, trap 27.


def test_where_random_starts_take_their_gradient():
    x, y = jnp.zeros((3, 8)).at[:, 4:].set(0.5), jnp.zeros(3, jnp.int32)
    threat, keys = jn.Linf(0.2), row_keys(KEY, 3)
    free = np.asarray(jn.attacks.uniform_unclipped(keys, threat, x))
    cut = np.asarray(jn.attacks.uniform(keys, threat, x))
    assert (free < 0).any()
    assert np.abs(free - x).max() <= 0.2 + 1e-6
    np.testing.assert_array_equal(cut, np.clip(free, 0, 1))
    np.testing.assert_array_equal(jn.attacks.at_clean(keys, threat, x), x)

    seen = []

    def logits(x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x)
        return jnp.concatenate([jnp.zeros((3, 1)), x.sum(axis=1, keepdims=True)], axis=1)

    for start, x_0 in ((jn.attacks.uniform, cut), (jn.attacks.uniform_unclipped, free)):
        seen.clear()
        x_adv = jn.attacks.fgsm(KEY, logits, x, y, threat=threat, step_size=0.25, start=start)
        jax.effects_barrier()
        np.testing.assert_allclose(seen[0], x_0, atol=1e-7)
        # Every gradient is positive; the step of 1.25 epsilon goes from the start, and is cut to ball and box.
        np.testing.assert_allclose(x_adv, np.clip(x_0 + 0.25, 0, x + 0.2), atol=1e-6)
        # From the clipped start the black background always saturates: that is what a network learns as a signal.
        saturated = np.isclose(np.asarray(x_adv)[:, :4], 0.2, atol=1e-6)
        assert saturated.all() == (start is jn.attacks.uniform)


def test_a_start_outside_the_box_is_no_candidate():
    """Its loss is the highest, where no valid point can be."""
    x, y = jnp.zeros((20, 3)), jnp.zeros(20, jnp.int32)
    logits_fn = lambda x: jnp.concatenate([x.sum(axis=1, keepdims=True), jnp.zeros((len(x), 1))], axis=1)  # noqa: E731
    x_adv = jn.attacks.pgd(
        KEY, logits_fn, x, y, threat=jn.Linf(0.3), steps=1, start=jn.attacks.uniform_unclipped, loss=margin
    )
    references.assert_inside(jn.Linf(0.3), x_adv, x)


# Saturated logits, trap 5.


@pytest.fixture(scope="module")
def confident():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(0.2, 0.8, size=(16, 8)), jnp.float32)
    weights = jnp.asarray(random.normal(size=(8, 5)), jnp.float32)
    logits_fn = Partial(lambda w, scale, shift, x: scale * (jnp.tanh(x @ w) + shift), weights)
    return x, jnp.argmax(x @ weights, axis=1), lambda scale, shift: Partial(logits_fn, scale, shift)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_scaled_and_shifted_logits_do_not_change_margin_and_dlr(confident, loss):
    x, y, model = confident
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.05), steps=5, loss=loss)
    expected = attack(KEY, model(1.0, 0.0), x, y)
    for scale, shift in ((1e3, 0.0), (1e-3, 0.0), (1.0, 4.0), (1e3, -4.0)):
        np.testing.assert_allclose(attack(KEY, model(scale, shift), x, y), expected, atol=1e-5)


def test_cross_entropy_is_blind_where_logits_saturate(confident, x64):
    x, y, model = confident
    x = x.astype(float)  # in single precision exp(0) is 1 to rounding alone
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.3), steps=5, start=jn.attacks.at_clean)
    survivors = {}
    for loss in (cross_entropy, margin):
        x_adv = attack(KEY, model(1e4, 0.0), x, y, loss=loss)
        survivors[loss] = (jnp.argmax(model(1.0, 0.0)(x_adv), axis=1) == y).sum()
    assert survivors[cross_entropy] > survivors[margin] + 4


# One program for many epsilons.


@every_threat
def test_vmap_over_epsilon(cls):
    x, y, weights = rows_and_weights(0, 4)
    logits_fn = Partial(lambda w, x: jnp.sin(x @ w), jnp.asarray(weights, jnp.float32))
    epsilons = jnp.linspace(0, 0.4, 5)
    swept = jax.jit(
        jax.vmap(lambda e: jn.attacks.pgd(KEY, logits_fn, x, y, threat=cls(e, **WIDE), steps=3, loss=margin))
    )(epsilons)
    for epsilon, result in zip(epsilons, swept, strict=True):
        alone = jn.attacks.pgd(KEY, logits_fn, x, y, threat=cls(epsilon, **WIDE), steps=3, loss=margin)
        np.testing.assert_allclose(result, alone, atol=1e-5)
    assert references.norm(2, swept[-1] - x).min() > references.norm(2, swept[1] - x).max()
