"""Ensembles are means of logits; a transfer table holds what each target says of each surrogate's examples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.parts.queries import Queried, counts_queries
from jaxnets.attacks.parts.stochastic import Stochastic
from jaxnets.attacks.transfer import ensemble
from jaxnets.transferability import transferability
from jaxnets.verification import InvalidExample

KEY = jax.random.key(0)


def linear(weights, x):
    return x @ weights


def weights(seed, classes=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, classes)), jnp.float32)


X = np.random.default_rng(9).uniform(0.3, 0.7, (25, 4)).astype(np.float32)


def test_an_ensemble_is_the_mean_of_logits():
    members = [Partial(linear, weights(seed)) for seed in range(3)]
    np.testing.assert_allclose(ensemble(*members)(X), sum(X @ weights(seed) for seed in range(3)) / 3, rtol=1e-5)
    np.testing.assert_allclose(ensemble(members[0])(X), X @ weights(0), rtol=1e-5)
    assert ensemble(lambda x: x.astype(jnp.bfloat16))(X).dtype == jnp.float32


def test_new_parameters_in_an_ensemble_mean_no_new_trace():
    traces = []

    def noted(weights, x):
        traces.append(0)
        return x @ weights

    attack = partial(jn.attacks.fgsm, threat=jn.Linf(0.1))
    y = jnp.zeros(len(X), jnp.int32)
    attack(KEY, ensemble(Partial(noted, weights(0)), Partial(noted, weights(1))), jnp.asarray(X), y)
    first = len(traces)
    attack(KEY, ensemble(Partial(noted, weights(2)), Partial(noted, weights(3))), jnp.asarray(X), y)
    assert 0 < first == len(traces)


def test_a_member_that_draws_makes_an_ensemble_that_draws():
    noisy = Stochastic(lambda key, x: x[:, :3] + jax.random.normal(key, (len(x), 3)), KEY, samples=5)
    both = ensemble(Partial(linear, weights(0)), noisy)
    assert isinstance(both, Stochastic)
    assert both.samples == 5
    first, again, other = both(X), both(X), both.draw(1, len(X))(X)
    np.testing.assert_array_equal(first, again)
    plain = (X @ weights(0) + X[:, :3]) / 2
    draws = [np.asarray(one - plain) for one in (first, other)]
    assert (draws[0] != draws[1]).all()
    assert 0.3 < np.std(draws) < 0.7, "half the noise, since half the mean"


def test_bad_ensembles_raise():
    with pytest.raises(ValueError, match="at least one model"):
        ensemble()
    with pytest.raises(ValueError, match=r"need the same classes, got \[3, 2\]"):
        ensemble(Partial(linear, weights(0)), Partial(linear, weights(0, classes=2)))(X)


# The table.


def by_coordinate(place, x):
    """Class 1 where one coordinate is above one half."""
    lead = x[:, place] - 0.5
    return jnp.stack([-lead, lead], axis=1)


MODELS = {name: Partial(by_coordinate, place) for place, name in enumerate(("first", "second"))}
Y = (X[:, 0] > 0.5).astype(np.int32)
THREAT = jn.Linf(0.3)
FGSM = partial(jn.attacks.fgsm, threat=THREAT, loss=jn.losses.margin)


def test_examples_fool_the_model_they_were_made_on_and_no_other():
    pair = {**MODELS, "both": ensemble(*MODELS.values())}
    result = transferability(KEY, pair, MODELS, X, Y, {"fgsm": FGSM}, threat=THREAT, batch_size=8)
    right = X[:, 1] > 0.5
    np.testing.assert_array_equal(result.clean["first"], np.ones(25, bool))
    np.testing.assert_array_equal(result.clean["second"], right == Y)
    assert list(result.survived) == [("fgsm", "first"), ("fgsm", "second"), ("fgsm", "both")]
    for surrogate, fooled in (("first", {"first"}), ("second", {"second"}), ("both", {"first", "second"})):
        for target in MODELS:
            expected = np.zeros(25, bool) if target in fooled else result.clean[target]
            np.testing.assert_array_equal(result.survived["fgsm", surrogate][target], expected)
    share = result.clean["second"].mean()
    np.testing.assert_allclose(result.accuracies(), [[0, share], [1, 0], [0, 0]])
    np.testing.assert_allclose(result.success_rates(), [[1, 0], [0, 1], [1, 1]])
    assert result.queries == {}


def test_rows_that_the_surrogate_gets_wrong_are_attacked_too():
    result = transferability(KEY, MODELS, MODELS, X, 1 - Y, {"fgsm": FGSM}, threat=THREAT)
    assert (result.examples["fgsm", "first"] != X).any(axis=1).all()
    assert not result.clean["first"].any()
    assert np.isnan(result.success_rates()[:, 0]).all()


def test_a_row_that_an_attack_mends_has_not_survived():
    towards = lambda key, logits_fn, x, y: x + jnp.where(y == 1, 0.2, -0.2)[:, None]  # noqa: E731
    result = transferability(KEY, MODELS, MODELS, X, Y, {"mends": towards}, threat=THREAT)
    np.testing.assert_array_equal(jnp.argmax(MODELS["second"](result.examples["mends", "first"]), axis=1), Y)
    np.testing.assert_array_equal(result.survived["mends", "first"]["second"], result.clean["second"])
    assert not result.clean["second"].all()


def test_batches_do_not_matter_and_progress_is_told():
    pgd = partial(jn.attacks.pgd, threat=THREAT, steps=2)
    told = []
    results = [
        transferability(
            KEY, MODELS, MODELS, X, Y, {"pgd": pgd}, threat=THREAT, batch_size=size, on_batch=lambda *a: told.append(a)
        )
        for size in (8, 500)
    ]
    for name in results[0].examples:
        np.testing.assert_allclose(results[0].examples[name], results[1].examples[name], atol=1e-6)
    assert sum(rows for attack, surrogate, rows in told if (attack, surrogate) == ("pgd", "first")) == 2 * 25


def test_the_table_has_a_line_a_surrogate_and_a_column_a_target():
    lines = str(transferability(KEY, MODELS, MODELS, X, Y, {"fgsm": FGSM}, threat=THREAT)).splitlines()
    assert [name in lines[0] for name in MODELS] == [True, True]
    starts = ("clean", "fgsm on first", "fgsm on second")
    assert all(line.startswith(start) for line, start in zip(lines[2:], starts, strict=True))
    assert "0/25" in lines[3]
    assert "25/25" in lines[4]


def test_queries_are_reported():
    @counts_queries
    def asks(key, logits_fn, x, target):
        return Queried(x, jnp.full(len(x), 7))

    result = transferability(KEY, MODELS, MODELS, X, Y, {"asks": asks}, threat=THREAT)
    np.testing.assert_array_equal(result.queries["asks", "second"], 7)


def test_examples_are_verified():
    cheat = lambda key, logits_fn, x, target: x + 0.3001  # noqa: E731
    with pytest.raises(InvalidExample, match="cheat on first"):
        transferability(KEY, MODELS, MODELS, X, Y, {"cheat": cheat}, threat=THREAT)


@pytest.mark.parametrize("missing", ["surrogate", "target", "attack"])
def test_nothing_to_do_raises(missing):
    given = [{} if missing == what else models for what, models in (("surrogate", MODELS), ("target", MODELS))]
    attacks = {} if missing == "attack" else {"fgsm": FGSM}
    with pytest.raises(ValueError, match=f"at least one {missing}"):
        transferability(KEY, *given, X, Y, attacks, threat=THREAT)
    with pytest.raises(ValueError, match="as many classes as rows"):
        transferability(KEY, MODELS, MODELS, X, Y[:3], {"fgsm": FGSM}, threat=THREAT)


@pytest.mark.parametrize(("change", "words"), [
    ({"x": 255 * X}, r"transferability takes rows inside the threat's box \[0.0, 1.0\], got values from"),
    ({"x": X.astype(jnp.bfloat16)}, "transferability takes rows in single or double precision, got bfloat16"),
    ({"threat": jn.Linf(np.full(25, 0.3))}, r"it takes one epsilon for all, got \(25,\)"),
])  # fmt: skip
def test_rows_that_do_not_fit_the_threat_raise(change, words):
    x, threat = change.get("x", X), change.get("threat", THREAT)
    with pytest.raises(ValueError, match=words):
        transferability(KEY, MODELS, MODELS, x, Y, {"fgsm": FGSM}, threat=threat)


def test_rows_in_double_precision_are_those_that_devices_hold():
    few, attack = jn.L0(2), partial(jn.attacks.pgd, threat=jn.L0(2), steps=2)
    doubles = np.random.default_rng(9).uniform(0.3, 0.7, (25, 4))
    result = transferability(KEY, MODELS, MODELS, doubles, Y, {"pgd": attack}, threat=few)
    assert ((result.examples["pgd", "first"] != doubles.astype(np.float32)).sum(axis=1) <= 2).all()
