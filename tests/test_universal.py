"""One perturbation for all rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.parts import rules
from jaxnets.attacks.parts.stochastic import Stochastic
from jaxnets.attacks.universal import apply_universal, universal
from jaxnets.threats import Masked

KEY = jax.random.key(0)
margin, targeted = jn.losses.margin, jn.losses.targeted
WIDE = {"lower": -50.0, "upper": 50.0}


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


@pytest.mark.parametrize(("cls", "dual"), [(jn.Linf, 1), (jn.L2, 2), (jn.L1, np.inf)], ids=["Linf", "L2", "L1"])
def test_gain_on_a_linear_model(cls, dual):
    """Rows of one class have one gradient, and its best step is known."""
    random = np.random.default_rng(0)
    weights = jnp.asarray(random.normal(size=(12, 2)), jnp.float32)
    x, y = jnp.asarray(random.normal(size=(10, 3, 4)), jnp.float32), jnp.zeros(10, jnp.int32)
    run = partial(universal, KEY, Partial(linear, weights), x, y, threat=cls(0.5, **WIDE), loss=margin, most=jnp.inf)
    delta = run(epochs=40, batch_size=4)
    assert delta.shape == (3, 4)
    gain = np.asarray(delta).ravel() @ np.asarray(weights[:, 1] - weights[:, 0])
    assert gain >= 0.97 * 0.5 * np.linalg.norm(np.asarray(weights[:, 1] - weights[:, 0]), dual)
    assert cls(0.5, **WIDE).size(delta) <= 0.5 + 1e-6


@pytest.fixture(scope="module")
def classes():
    """Rows around three centres, some pixels at the faces of the box, and a network that tells them apart."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(16, 3))
    x = np.clip(0.5 + 0.2 * random.normal(size=(90, 4, 4, 1)), 0, 1)
    x[:, :2, 0] = 0
    logits_fn = Partial(linear, jnp.asarray(weights, jnp.float32))
    x = jnp.asarray(x, jnp.float32)
    return logits_fn, x, jnp.argmax(logits_fn(x), axis=1)


def wrong(logits_fn, delta, x, y, threat):
    return float((jnp.argmax(logits_fn(apply_universal(delta, x, threat=threat)), axis=1) != y).mean())


def test_fools_rows_that_it_has_not_seen_far_more_than_a_random_one(classes):
    logits_fn, x, y = classes
    for threat in (jn.Linf(0.15), jn.L2(0.6), jn.L1(2.0)):
        delta = universal(KEY, logits_fn, x[:60], y[:60], threat=threat, batch_size=16)
        assert jnp.isfinite(delta).all()
        assert threat.size(delta) <= threat.epsilon + 1e-6
        random = threat.sample(KEY, jnp.zeros((4, 4, 1)))
        assert wrong(logits_fn, delta, x[60:], y[60:], threat) > 0.15 + wrong(logits_fn, random, x[60:], y[60:], threat)


def test_a_black_background_moves():
    """A pixel at 0 in all rows: the plain gradient of a clip is zero there."""
    logits = lambda x: jnp.concatenate([0.1 + 0 * x[:, :1], x[:, :1] - x[:, 1:]], axis=1)  # noqa: E731
    x, y = jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.zeros(2, jnp.int32)
    delta = universal(KEY, logits, x, y, threat=jn.Linf(0.2), epochs=20, loss=margin)
    np.testing.assert_allclose(delta, [0.2, -0.2], atol=1e-6)


def test_targeted_reaches_its_class(classes):
    logits_fn, x, _ = classes
    delta = universal(
        KEY, logits_fn, x, jnp.full(90, 1), threat=jn.Linf(0.3), loss=targeted(jn.losses.cross_entropy), batch_size=30
    )
    hits = lambda x: (jnp.argmax(logits_fn(x), axis=1) == 1).mean()  # noqa: E731
    assert hits(apply_universal(delta, x, threat=jn.Linf(0.3))) > 0.9 > hits(x) + 0.2


def sloping(x):
    """Logits whose margin for class 0 rises with the first number of a row as steeply as its second one says."""
    return jnp.concatenate([jnp.zeros((len(x), 1)), x[:, :1] * x[:, 1:]], axis=1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 9])
def test_every_row_counts_once_an_epoch_whatever_the_batch(batch_size):
    """With plain gradient steps and constant gradients the result is their sum."""
    slopes = jnp.array([[1.0], [-3.0], [0.5], [7.0], [0.25]])
    x, y = jnp.concatenate([jnp.zeros((5, 1)), slopes], axis=1), jnp.zeros(5, jnp.int32)
    delta = universal(
        KEY, sloping, x, y, threat=Masked([True, False], 99.0, -99.0, 99.0), loss=margin, most=jnp.inf, epochs=3,
        batch_size=batch_size, step_size=1.0, rule=rules.by_optax(optax.sgd(1.0)),
    )  # fmt: skip
    np.testing.assert_allclose(delta, [3 * 5.75, 0], rtol=1e-5)


def test_losses_beyond_the_most_do_not_count():
    """One row with a steep loss that is lost already, and two others that want the opposite."""
    slopes = jnp.array([[10.0], [-1.0], [-1.0]])
    x, y = jnp.concatenate([jnp.full((3, 1), 0.5), slopes], axis=1), jnp.zeros(3, jnp.int32)
    run = partial(universal, KEY, sloping, x, y, threat=Masked([True, False], 0.1, **WIDE), loss=margin)
    assert run(most=jnp.inf)[0] > 0.05
    assert run(most=0.0)[0] < -0.05


def test_rules_and_models_that_draw(classes):
    logits_fn, x, y = classes
    noisy = Stochastic(Partial(lambda f, key, x: f(x + 0.1 * jax.random.normal(key, x.shape)), logits_fn), KEY, 2)
    threat = jn.Linf(0.15)
    plain = wrong(logits_fn, jnp.zeros((4, 4, 1)), x, y, threat)
    for rule in (rules.momentum(), rules.nesterov()):
        assert wrong(logits_fn, universal(KEY, noisy, x, y, threat=threat, rule=rule), x, y, threat) > plain + 0.2


def test_new_numbers_mean_no_new_trace_and_jit_equals_eager(classes):
    logits_fn, x, y = classes
    traces = []

    def counted(weights, x):
        traces.append(0)
        return linear(weights, x)

    run = lambda eps, w: universal(KEY, Partial(counted, w), x, y, threat=jn.Linf(eps), epochs=2)  # noqa: E731
    weights = logits_fn.args[0]
    first = run(0.1, weights)
    count = len(traces)
    assert jnp.abs(run(0.2, weights) - first).max() > 1e-3
    run(0.1, -weights)
    assert count == len(traces)
    np.testing.assert_allclose(jax.jit(run)(0.1, weights), first, atol=1e-6)


def test_a_sticker_for_one_object(classes):
    """The same pixels changed in all photographs, no others."""
    logits_fn, x, y = classes
    mask = np.zeros((4, 4, 1), bool)
    mask[1:3, 1:3] = True
    threat = Masked(mask)
    mine = x[y == 0]
    delta = universal(KEY, logits_fn, mine, jnp.zeros(len(mine), jnp.int32), threat=threat, epochs=20)
    assert (delta[~mask] == 0).all()
    assert wrong(logits_fn, delta, mine, 0, threat) > 0.3


def test_bad_arguments_raise():
    x, y = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="epochs=0"):
        universal(KEY, lambda x: x, x, y, threat=jn.Linf(0.1), epochs=0)
    with pytest.raises(ValueError, match="one epsilon"):
        universal(KEY, lambda x: x, x, y, threat=jn.Linf(jnp.full(4, 0.1)))
    with pytest.raises(ValueError, match="B = 4 rows"):
        universal(KEY, lambda x: x, x, y[:3], threat=jn.Linf(0.1))
