"""The suite on small nets, and every doubt about a model on one broken on purpose."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_inside

import jaxnets as jn
from jaxnets.attacks.autoattack import autoattack, averaged_over, plus, rand, standard
from jaxnets.attacks.checks import ModelWarning, black_box_wins, check_model
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.stochastic import Stochastic

KEY = jax.random.key(0)
SIDE, CLASSES, ROWS = 4, 5, 12


def images(rows=ROWS, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 0.8, (rows, SIDE, SIDE, 1)), jnp.float32)


def linear(classes=CLASSES, scale=1.0, seed=1):
    weights = np.random.default_rng(seed).normal(size=(SIDE * SIDE, classes)) * scale
    return jax.tree_util.Partial(lambda weights, x: x.reshape(len(x), -1) @ weights, jnp.asarray(weights, jnp.float32))


def tiny(threat, *, classes):
    """The standard suite in miniature."""
    return {
        "apgd-ce": partial(jn.attacks.apgd, threat=threat, steps=5),
        "apgd-t": partial(jn.attacks.apgd_targeted, threat=threat, steps=5, classes=classes - 1),
        "fab-t": partial(jn.attacks.fab_targeted, threat=threat, steps=5, classes=classes - 1),
        "square": partial(jn.attacks.square, threat=threat, queries=20),
    }


@pytest.mark.parametrize(
    "threat",
    [
        jn.Linf(0.05),
        pytest.param(jn.L2(0.15), marks=pytest.mark.slow),
        pytest.param(jn.L1(0.4), marks=pytest.mark.slow),
    ],
)
def test_it_finds_the_known_victims_of_a_linear_model(threat):
    model, x = linear(), images()
    y = jnp.argmax(model(x), axis=-1)
    x_adv = autoattack(KEY, model, x, y, threat=threat, version=tiny)
    assert_inside(threat, x_adv, x)
    # The box does not bind: a row falls where some difference of logits is below epsilon times its dual norm.
    weights = np.asarray(model.args[0], np.float64)
    order = {jn.Linf: 1, jn.L2: 2, jn.L1: np.inf}[type(threat)]
    logits = np.asarray(model(x), np.float64)
    gaps = logits.max(axis=1, keepdims=True) - logits
    reach = np.array(
        [[np.linalg.norm(weights[:, j] - weights[:, i], order) for j in range(CLASSES)] for i in range(CLASSES)]
    )
    margins = np.where(np.eye(CLASSES, dtype=bool)[y], np.inf, gaps - threat.epsilon * reach[y]).min(axis=1)
    fallen = np.asarray(jnp.argmax(model(x_adv), axis=-1) != y)
    clear = np.abs(margins) > 0.02
    assert clear.sum() >= ROWS - 3
    assert 0 < fallen.sum() < ROWS
    np.testing.assert_array_equal(fallen[clear], (margins < 0)[clear])
    np.testing.assert_array_equal(np.asarray(x_adv)[~fallen], np.asarray(x)[~fallen])


def test_it_needs_the_host():
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(partial(autoattack, threat=jn.Linf(0.1)), static_argnums=1)(
            KEY, linear(), images(), jnp.zeros(ROWS, int)
        )


@pytest.mark.parametrize(("x", "threat", "words"), [
    (images(), jn.Linf(jnp.full(ROWS, 0.1)), r"takes one epsilon for all, got \(12,\)"),
    (255 * images(), jn.Linf(0.1), r"autoattack takes rows inside the threat's box \[0.0, 1.0\], got values from"),
    (images().reshape(ROWS, -1), jn.Linf(0.1), r"takes images \[B, H, W, C\] or \[B, H, W\], for Square, got shape"),
])  # fmt: skip
def test_what_it_cannot_attack_is_refused_before_it_begins(x, threat, words):
    with pytest.raises(ValueError, match=words):
        autoattack(KEY, linear(), x, jnp.zeros(ROWS, int), threat=threat)


@pytest.mark.parametrize(("version", "names"), [
    (standard, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    (plus, ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]),
    (rand, ["apgd-ce", "apgd-dlr"]),
])  # fmt: skip
def test_versions_are_the_published_ones(version, names):
    assert list(version(jn.Linf(0.1), classes=10)) == names
    attacks = version(jn.Linf(0.1), classes=10)
    if "apgd-t" in attacks:
        assert attacks["apgd-t"].keywords["classes"] == 9
        assert attacks["fab-t"].keywords["classes"] == 9
        assert attacks["square"].keywords["queries"] == 5000


@pytest.mark.parametrize(("classes", "names"), [
    (2, ["apgd-ce", "apgd-margin", "fab-t", "square"]),
    (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
    (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
])  # fmt: skip
def test_few_classes(classes, names):
    attacks = standard(jn.Linf(0.1), classes=classes)
    assert list(attacks) == names
    assert attacks["fab-t"].keywords["classes"] == classes - 1


def test_averaging_sets_the_draws_of_a_random_model():
    seen = []
    spy = lambda key, logits_fn, x, target: seen.append(logits_fn) or x  # noqa: E731
    noisy = Stochastic(lambda key, x: x, KEY)
    averaged_over(7, spy)(KEY, noisy, None, None)
    averaged_over(7, spy)(KEY, len, None, None)
    assert seen[0].samples == 7
    assert seen[1] is len


# Doubts. A sound model gives none; each broken one gives its own.


def noisy(key, x):
    return linear()(x) + jax.random.normal(key, (len(x), CLASSES))


def fickle(x):
    """Draws anew whenever it is traced, behind JAX's back."""
    return linear()(x) + np.random.default_rng().normal(size=CLASSES)


BROKEN = {
    "the model draws": Stochastic(noisy, KEY),
    "two calls gave different logits": fickle,
    "returns probabilities": lambda x: jax.nn.softmax(linear()(x)),
    "zero at 100% of the rows": lambda x: linear()(jnp.round(4 * x) / 4),
    "zero at": linear(scale=1e6),
    "3 classes": linear(classes=3),
}


def doubts(model):
    x = images()
    y = jnp.argmax(model(x), axis=-1)
    return check_model(KEY, model, x, y)


def test_a_sound_model_raises_no_doubt():
    assert doubts(linear()) == []


@pytest.mark.parametrize("said", BROKEN)
def test_every_doubt_fires_on_a_model_broken_on_purpose(said):
    found = doubts(BROKEN[said])
    assert len(found) == 1, found
    assert said in found[0]


def test_square_beating_the_rest_is_told():
    left = {"apgd-ce": np.array([True, True, True, False]), "square": np.array([True, False, False, False])}
    assert "broke 2 rows" in black_box_wins(left)[0]
    assert black_box_wins({**left, "square": left["apgd-ce"]}) == []
    assert black_box_wins({"square": left["square"]}) == []
    assert black_box_wins({"apgd-ce": left["apgd-ce"]}) == []


def test_square_breaks_what_masked_gradients_hide_and_autoattack_warns():
    def stepped(x):
        """No gradient anywhere, and far to go: class 1 where the mean, in steps of a sixteenth, is above 0.4."""
        lead = jnp.round(16 * x.reshape(len(x), -1).mean(axis=1)) / 16 - 0.4
        return jnp.stack([-lead, lead, *[jnp.full_like(lead, -9)] * 3], axis=1)

    def both(threat, *, classes):
        return {name: attack for name, attack in tiny(threat, classes=classes).items() if name in ("apgd-ce", "square")}

    x = jnp.full((8, SIDE, SIDE, 1), 0.3)
    with pytest.warns(ModelWarning) as told:
        autoattack(KEY, stepped, x, jnp.zeros(8, int), threat=jn.Linf(0.3), version=both)
    said = " ".join(str(warning.message) for warning in told)
    assert "gradient of the cross-entropy is zero at 100%" in said
    assert "Square, which takes no gradient, broke" in said


def test_a_sound_model_is_attacked_without_a_warning():
    model, x = linear(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoattack(KEY, model, x, jnp.argmax(model(x), -1), threat=jn.Linf(0.05), version=tiny)


def test_more_rows_than_the_model_is_checked_on_may_bring_their_keys():
    x = images(501)
    fgsm_alone = lambda threat, classes: {"fgsm": partial(jn.attacks.fgsm, threat=threat)}  # noqa: E731
    y = jnp.argmax(linear()(x), axis=1)
    found = autoattack(row_keys(KEY, 501), linear(), x, y, threat=jn.Linf(0.1), version=fgsm_alone)
    assert (found != x).any()


def test_a_random_model_under_rand_raises_no_doubt_of_drawing(recwarn):
    x = images(4)
    y = jnp.argmax(linear()(x), axis=1)
    found = autoattack(KEY, Stochastic(noisy, KEY), x, y, threat=jn.Linf(0.1), version=rand)
    assert jnp.abs(found - x).max() <= 0.1 + 1e-6
    assert not [warning for warning in recwarn if "the model draws" in str(warning.message)]
    with pytest.warns(ModelWarning, match="the model draws"):
        autoattack(KEY, fickle, x, y, threat=jn.Linf(0.1), version=rand)


def test_a_suite_is_made_once_for_an_epsilon():
    made = []

    def version(threat, classes):
        made.append(threat)
        return {"fgsm": partial(jn.attacks.fgsm, threat=threat)}

    x = images(4)
    for epsilon in (0.1, 0.1, 0.2, jnp.float32(0.1)):
        autoattack(KEY, linear(), x, jnp.zeros(4, jnp.int32), threat=jn.Linf(epsilon), version=version)
    assert [float(threat.epsilon) for threat in made] == [0.1, 0.2, pytest.approx(0.1)]


@pytest.mark.slow
def test_plus_leaves_no_more_than_standard():
    x = images(12)
    y = jnp.argmax(linear()(x), axis=1)
    threat = jn.Linf(0.02)
    left = {version: autoattack(KEY, linear(), x, y, threat=threat, version=version) for version in (standard, plus)}
    survivors = [int((jnp.argmax(linear()(x_adv), axis=1) == y).sum()) for x_adv in left.values()]
    assert 0 < survivors[1] <= survivors[0] < 12


def test_a_model_is_not_compiled_again_to_be_looked_at():
    traced = []

    def watched(x):
        traced.append(len(x))
        return linear()(x)

    x, y = np.asarray(images(4)), np.zeros(4, int)
    first = jn.attacks.check_model(jax.random.key(0), watched, x, y)
    count = len(traced)
    assert jn.attacks.check_model(jax.random.key(1), watched, x, y) == first
    assert len(traced) == count > 0
