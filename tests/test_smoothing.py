"""Randomized smoothing: radii against scipy and linear classifiers; certificates are wrong as seldom as they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxnets.certificates import smoothing
from jaxnets.certificates.smoothing import ABSTAIN, certify, predict, radius

KEY = jax.random.key(0)


def lead(x):
    """Two classes by the sign of the first coordinate."""
    return jnp.stack([-x[:, 0], x[:, 0]], axis=1)


@pytest.mark.parametrize("alpha", [0.3, 0.001, 1e-6])
@pytest.mark.parametrize("n", [10, 100_000])
def test_radii_against_scipy(n, alpha):
    """By the beta distribution, by scipy's exact interval of a binomial test, and by the binomial distribution."""
    hits, sigma = np.unique(np.linspace(0, n, 23).astype(int)), 0.25
    found = radius(hits, n, sigma=sigma, alpha=alpha)
    least = np.nan_to_num(stats.beta.ppf(alpha, hits, n - hits + 1))
    expected = np.where(least > 0.5, sigma * stats.norm.ppf(least), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    at_all_hits = -sigma * stats.norm.ppf(min(-np.expm1(np.log(alpha) / n), 0.5))
    np.testing.assert_allclose(found[-1], at_all_hits, rtol=1e-12, atol=1e-12)
    for k, one in zip(hits, found, strict=True):
        interval = stats.binomtest(int(k), n, alternative="greater").proportion_ci(1 - alpha, method="exact")
        np.testing.assert_allclose(one, sigma * stats.norm.ppf(max(interval.low, 0.5)), rtol=1e-8, atol=1e-12)
    assert found[0] == 0
    sure = found > 0
    np.testing.assert_allclose(stats.binom.sf(hits[sure] - 1, n, stats.norm.cdf(found[sure] / sigma)), alpha, rtol=1e-6)


def test_against_the_radius_of_a_linear_classifier():
    random = np.random.default_rng(0)
    direction, offset = random.normal(size=(6, 2)).astype(np.float32), random.normal(size=2).astype(np.float32)
    x = random.normal(size=(5, 6)).astype(np.float32)
    logits = x @ direction + offset
    exact = np.abs(logits[:, 0] - logits[:, 1]) / np.linalg.norm(direction[:, 0] - direction[:, 1])
    gaps = []
    for n in (200, 20_000):
        found = certify(KEY, lambda x: x @ direction + offset, x, sigma=1.0, n=n)
        told = found.classes != ABSTAIN
        np.testing.assert_array_equal(found.classes[told], logits.argmax(1)[told])
        assert (found.radii <= exact).all()
        gaps.append(exact - found.radii)
    assert (gaps[1] <= gaps[0]).all()
    assert told.all()
    reachable = exact < 2.5
    assert reachable.any()
    assert (gaps[1][reachable] < 0.12).all()


def test_it_is_wrong_as_often_as_it_says():
    """Rows of one true radius, certified a thousand times at a level of 10%."""
    x, alpha = np.full((1000, 1), 0.5, np.float32), 0.1
    found = certify(KEY, lead, x, sigma=1.0, n0=10, n=200, alpha=alpha)
    failures = int(((found.radii > 0.5) | (found.classes == 0)).sum())
    assert stats.binomtest(failures, 1000, alpha, alternative="greater").pvalue > 1e-3
    assert failures > 40, "an interval at this level fails about 80 times in 1000"


def test_a_class_is_not_counted_by_the_draws_that_chose_it():
    """Where both classes come as often, any radius is wrong; with the same draws it would be so twice as often."""
    x, alpha = np.zeros((500, 1), np.float32), 0.3
    found = certify(KEY, lead, x, sigma=1.0, n0=101, n=101, alpha=alpha)
    assert stats.binomtest(int((found.radii > 0).sum()), 500, alpha, alternative="greater").pvalue > 1e-3
    np.testing.assert_array_equal(found.classes == ABSTAIN, found.radii == 0)


def test_the_noise_is_added_in_data_space_and_not_cut():
    """Draws above the box's end count, and a network that divides by a deviation sees noise as many times larger."""
    above = lambda x: jnp.stack([x[:, 0] * 0, jnp.where(x[:, 0] > 1.0, 1.0, -1.0)], axis=1)  # noqa: E731
    x = np.full((1, 1), 1.1, np.float32)
    for network in (above, lambda x: above(0.25 * ((x - 0.5) / 0.25) + 0.5)):
        found = certify(KEY, network, x, sigma=0.1, n=10_000)
        assert found.classes == [1]
        np.testing.assert_allclose(found.radii, 0.1, atol=0.01)


def test_the_noise_of_rows_in_half_precision_has_tails():
    """Normal draws in bfloat16 end at 2.5."""
    beyond = lambda x: jnp.stack([x[:, 0] > 2.7, x[:, 0] <= 2.7], axis=1) * 1.0  # noqa: E731
    x = jnp.zeros((1, 1), jnp.bfloat16)
    found = certify(jax.random.key(0), beyond, x, sigma=1.0, n=20_000)
    # Were no draw beyond, the radius would be 3.4.
    assert found.classes[0] == 1
    assert 2.5 < found.radii[0] <= 2.7


def test_a_row_does_not_depend_on_its_batch():
    x, keys = np.linspace(-1, 1, 7, dtype=np.float32)[:, None], jax.random.split(KEY, 7)
    settings = {"sigma": 0.7, "n0": 30, "n": 200, "alpha": 0.01}
    whole = certify(keys, lead, x, **settings)
    parts = [certify(keys[rows], lead, x[rows], **settings) for rows in (slice(0, 3), slice(3, 7))]
    np.testing.assert_array_equal(whole.radii, np.concatenate([part.radii for part in parts]))
    np.testing.assert_array_equal(whole.classes, np.concatenate([part.classes for part in parts]))
    few_at_once = certify(keys, lead, x, batch_size=7, **settings)
    np.testing.assert_array_equal(whole.radii, few_at_once.radii)
    assert len(set(certify(KEY, lead, np.full((9, 1), 0.3, np.float32), **settings).radii)) > 3


def test_counts_are_of_so_many_draws():
    counts = partial(smoothing._counts, jax.tree_util.Partial(lead), KEY, jnp.zeros(1), sigma=1.0)
    for draws, batch_size in ((1, 10), (10, 10), (25, 10)):
        assert counts(stage=0, draws=draws, batch_size=batch_size).sum() == draws
    first, second = (counts(stage=stage, draws=1000, batch_size=1000) for stage in (0, 1))
    assert (first != second).any()


def test_predictions():
    x = np.array([[1.0], [0.0], [-1.0], [0.05]], np.float32)
    found = predict(KEY, lead, x, sigma=1.0)
    np.testing.assert_array_equal(found, [1, ABSTAIN, 0, ABSTAIN])
    settings = {"sigma": 1.0, "stage": 0, "draws": 1000, "batch_size": 1000}
    counts = [
        np.asarray(smoothing._counts(jax.tree_util.Partial(lead), jax.random.fold_in(KEY, row), x[row], **settings))
        for row in range(4)
    ]
    for count, told in zip(counts, found, strict=True):
        assert (stats.binomtest(int(count.max()), 1000).pvalue <= 0.001) == (told == count.argmax())


def test_predictions_are_wrong_as_seldom_as_they_say():
    """At a row where both classes come as often, a prediction of either is made with probability alpha at most."""
    found = predict(KEY, lead, np.zeros((500, 1), np.float32), sigma=1.0, n=101, alpha=0.3)
    assert stats.binomtest(int((found != ABSTAIN).sum()), 500, 0.3, alternative="greater").pvalue > 1e-3
    assert (found != ABSTAIN).sum() > 50


def test_logits_that_are_no_numbers_are_no_votes():
    broken = lambda x: jnp.where(x > -9, jnp.nan, 0.0) * jnp.ones((1, 3))  # noqa: E731
    x = np.zeros((1, 1), np.float32)
    assert certify(KEY, broken, x, sigma=1.0, n=50).classes == [ABSTAIN]
    assert predict(KEY, broken, x, sigma=1.0, n=50) == [ABSTAIN]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n0": 0}, "at least one draw, got n0=0"),
        ({"n": 0}, "got n=0"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"sigma": 0.0}, "sigma above 0"),
        ({"alpha": 1.0}, r"alpha inside \(0, 1\)"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        certify(KEY, lead, np.zeros((1, 1), np.float32), **{"sigma": 1.0, **settings})


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"float array of rows \[N, ...\], got int64\[1, 1\]"):
        certify(KEY, lead, np.zeros((1, 1), int), sigma=1.0)
