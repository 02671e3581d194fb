"""Kurakin et al.'s batches: which rows, how large an epsilon, and attacks that do not look at the label."""

from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

import jaxnets as jn
from jaxnets.attacks.parts.queries import with_queries
from jaxnets.types import Batch

KEY = jax.random.key(0)


def showing(key, logits_fn, x, target, *, threat):
    """An "attack" that adds its row's epsilon, and its row's class to the last coordinate."""
    moved = x + threat.epsilon[:, None]
    return moved.at[:, -1].set(target)


NET = jn.from_linen(jn.models.MLP((), 3))


def examples(rows, **options):
    batch = Batch(jnp.zeros((rows, 3)), jnp.arange(rows) % 7 + 10)
    objective = jn.objectives.kurakin(NET, showing, **{"threat": jn.Linf(0.4), **options})
    params = {"Dense_0": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}}
    return np.asarray(objective.inner(params, {}, batch, KEY)), np.asarray(batch.y)


@pytest.mark.parametrize(("rows", "share", "attacked"), [
    (8, 0.5, [0, 2, 4, 6]),
    (6, 1 / 3, [0, 3]),
    (6, 2 / 3, [0, 1, 3, 4]),
    (5, 0.4, [0, 1]),
    (4, 0.0, []),
    (4, 1.0, [0, 1, 2, 3]),
])  # fmt: skip
def test_evenly_spaced_rows_keep_their_places_and_classes(rows, share, attacked):
    x, y = examples(rows, share=share)
    assert np.flatnonzero(x[:, 0]).tolist() == attacked
    np.testing.assert_array_equal(x[attacked, -1], y[attacked])
    assert (x[np.setdiff1d(np.arange(rows), attacked)] == 0).all()


@pytest.mark.parametrize("spread", [0.5, 0.25])
def test_epsilons_are_those_of_a_normal_cut_off(spread):
    x, _ = examples(4000, share=1.0, spread=spread)
    epsilons = x[:, 0].astype(float)
    assert 0 < epsilons.min() < 0.01
    assert epsilons.max() < 0.4
    expected = stats.truncnorm(0, 1 / spread, scale=0.4 * spread)
    assert stats.kstest(epsilons, expected.cdf).pvalue > 0.01
    assert stats.kstest(epsilons, stats.truncnorm(0, 1.1 / spread, scale=0.44 * spread).cdf).pvalue < 1e-3


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="share is the part of a batch that is attacked, from 0 to 1, got 16"):
        jn.objectives.kurakin(NET, showing, threat=jn.Linf(0.1), share=16)


X = jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.7, (6, 4)), jnp.float32)
MODEL = Partial(jnp.dot, b=jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32))


@pytest.mark.parametrize("attack", [jn.attacks.on_prediction(jn.attacks.fgsm), jn.attacks.least_likely_class])
def test_attacks_against_label_leaking_do_not_look_at_the_label(attack):
    """FGSM on the label itself does: that is the leak."""
    predicted = jnp.argmax(MODEL(X), axis=1)
    least = jnp.argmin(MODEL(X), axis=1)
    options = {"threat": jn.Linf(jnp.linspace(0.01, 0.06, 6))}
    # The least likely of the wrong classes is the least likely of all but where the label is that class itself.
    others = [y for y in (jnp.full(6, label) for label in range(3)) if attack is not jn.attacks.least_likely_class]
    labels = [predicted, 3 - predicted - least, *others]
    found = [attack(KEY, MODEL, X, y, **options) for y in labels]
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    np.testing.assert_array_equal(found[0] != X, np.ones((6, 4), bool))
    leaking = [jn.attacks.fgsm(KEY, MODEL, X, y, **options) for y in (predicted, least)]
    assert (leaking[0] != leaking[1]).any(axis=1).all()


def test_on_prediction_is_the_attack_on_the_predicted_class():
    predicted, wrong = jnp.argmax(MODEL(X), axis=1), jnp.argmin(MODEL(X), axis=1)
    attack = partial(jn.attacks.fgsm, threat=jn.Linf(0.05))
    expected = attack(KEY, MODEL, X, predicted)
    np.testing.assert_array_equal(jn.attacks.on_prediction(attack)(KEY, MODEL, X, wrong), expected)
    assert jn.attacks.on_prediction(jn.attacks.fgsm).__name__ == "fgsm"


@pytest.mark.parametrize("early", [True, False])
def test_on_prediction_is_blind_where_queries_are_counted_too(early):
    """Decorators copy what a function carries: the attack under them must not be taken for theirs."""
    images, wrong = X.reshape(len(X), 1, -1, 1), jnp.argmin(MODEL(X), axis=1)
    model = Partial(lambda model, x: model(x.reshape(X.shape)), MODEL)
    options = {"threat": jn.Linf(0.05), "queries": 20}
    attack = jn.attacks.on_prediction(partial(jn.attacks.square, **options) if early else jn.attacks.square)
    attack = attack if early else partial(attack, **options)
    found, queries = with_queries(attack)(KEY, model, images, wrong)
    expected = jn.attacks.square(KEY, model, images, jnp.argmax(MODEL(X), axis=1), **options)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(attack(KEY, model, images, wrong), expected)
    assert (queries <= 20).all()


def test_other_decorators_of_attacks_that_count_are_called():
    @wraps(jn.attacks.square)
    def twice(*arguments, **options):
        return 2 * jn.attacks.square(*arguments, **options)

    assert with_queries(twice) is None


def test_the_weight_may_be_traced():
    net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((4, 3)), jnp.arange(4))
    variables = net.init(KEY, batch.x)

    def value(weight):
        kurakin = jn.objectives.kurakin(net, jn.attacks.least_likely_class, threat=jn.Linf(0.1), weight=weight)
        return kurakin(*variables, batch, KEY)[0]

    np.testing.assert_allclose(jax.jit(value)(0.7), value(0.7), rtol=1e-6)
