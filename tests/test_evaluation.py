from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxnets as jn
from jaxnets.evaluation import evaluate, robustness_curve, table
from jaxnets.verification import InvalidExample, accuracy_interval, verify

KEY = jax.random.key(0)
THREAT = jn.Linf(0.1)


def model(x):
    """Two classes by the mean of a row: class 1 above one half."""
    lead = 10 * (jnp.mean(x, axis=1) - 0.5)
    return jnp.stack([-lead, lead], axis=1)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.15, 0.85, (43, 1)).astype(np.float32) + rng.uniform(-0.1, 0.1, (43, 6)).astype(np.float32)
    y = (x.mean(1) > 0.5).astype(np.int32)
    y[:5] = 1 - y[:5]  # five rows are wrong without an attack
    return x, y


FGSM = partial(jn.attacks.fgsm, threat=THREAT, loss=jn.losses.margin)
PGD = partial(jn.attacks.pgd, threat=THREAT, loss=jn.losses.margin, steps=5)


def test_accuracies_are_the_known_ones(rows):
    x, y = rows
    report = evaluate(KEY, model, x, y, {"fgsm": FGSM, "pgd": PGD}, threat=THREAT, batch_size=8)
    lead = (2 * y - 1) * (x.mean(1) - 0.5)
    np.testing.assert_array_equal(report.survived["clean"], lead > 0)
    np.testing.assert_array_equal(report.survived["fgsm"], lead > 0.1)  # the mean can move by epsilon
    assert report.accuracies()["clean"] == 38 / 43
    assert list(report.accuracies()) == ["clean", "fgsm", "pgd", "worst case"]


def test_the_worst_case_is_pointwise(rows):
    x, y = rows
    halves = [lambda k, f, x, t, side=side: x + jnp.where((x[:, :1] > 0.5) == side, 0.1, 0.0) for side in (True, False)]
    everywhere = partial(evaluate, KEY, lambda x: model(jnp.round(x, 1)), x, y)
    report = everywhere({"low": halves[1], "high": halves[0]}, threat=jn.Linf(0.1, 0.0, 2.0))
    both = report.survived["clean"] & report.survived["low"] & report.survived["high"]
    np.testing.assert_array_equal(report.with_worst_case()["worst case"], both)
    assert both.sum() < min(report.survived["low"].sum(), report.survived["high"].sum())


def test_rows_wrong_without_an_attack_do_not_survive_and_stay_as_they_are(rows):
    x, y = rows
    harmless = {"none": lambda key, logits_fn, x, target: x + 0.05}
    report = evaluate(KEY, lambda x: jnp.stack([x[:, 0] * 0, x[:, 0] * 0 + 1], 1), x, y, harmless, threat=THREAT)
    np.testing.assert_array_equal(report.survived["none"], y == 1)
    np.testing.assert_array_equal(report.examples["none"][y == 0], x[y == 0])


@pytest.mark.parametrize("batch_size", [1, 7, 43, 500])
def test_batches_do_not_matter(rows, batch_size):
    x, y = rows
    reports = [
        evaluate(KEY, model, x, y, {"pgd": PGD}, threat=THREAT, batch_size=size, mesh=jn.parallel.data_mesh(devices))
        for size, devices in ((batch_size, jax.devices()), (20, jax.devices()[:1]))
    ]
    np.testing.assert_allclose(reports[0].examples["pgd"], reports[1].examples["pgd"], atol=1e-6)
    np.testing.assert_array_equal(reports[0].survived["pgd"], reports[1].survived["pgd"])


CHEATS = {
    "leaves the ball": lambda x: x + 0.1001,
    "leaves the box": lambda x: x - 0.09,
    "is not finite": lambda x: x.at[0, 0].set(jnp.nan),
}


@pytest.mark.parametrize("what", CHEATS)
def test_cheating_attacks_are_refused(rows, what):
    x, y = rows
    x, y = np.clip(x - x.min(), 0, 0.85), np.ones_like(y)
    cheat = {"cheat": lambda key, logits_fn, x, target: CHEATS[what](x)}
    with pytest.raises(InvalidExample, match=f"attack 'cheat': .* {what}"):
        evaluate(KEY, lambda x: jnp.stack([x[:, 0] * 0, x[:, 0] * 0 + 1], 1), x, y, cheat, threat=THREAT)


@pytest.mark.parametrize(("threat", "inside", "outside"), [
    (jn.Linf(0.4), [0.4, -0.4], [0.40001, 0.0]),
    (jn.L2(0.5), [0.3, 0.4], [0.3, 0.40001]),
    (jn.L1(0.5), [0.2, -0.3], [0.2, -0.30001]),
])  # fmt: skip
def test_verify_knows_the_norms(threat, inside, outside):
    x = np.full((1, 2), 0.5)
    verify("it", x + np.array(inside), x, threat)
    with pytest.raises(InvalidExample, match="leaves the ball"):
        verify("it", x + np.array(outside), x, threat)


def test_curve_is_one_compilation_and_never_rises(rows):
    x, y = rows
    calls = []

    def attack(key, logits_fn, x, target, *, threat):
        calls.append(1)
        return jn.attacks.fgsm(key, logits_fn, x, target, threat=threat, loss=jn.losses.margin)

    epsilons = np.linspace(0, 0.3, 7)
    accuracies = robustness_curve(KEY, model, x, y, attack, threat=THREAT, epsilons=epsilons)
    assert len(calls) == 1
    lead = (2 * y - 1) * (x.mean(1) - 0.5)
    assert (np.diff(accuracies) <= 0).all()
    np.testing.assert_allclose(accuracies[:3], [(lead > epsilon).mean() for epsilon in epsilons[:3]])


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (7, 10), (887, 1000)])
def test_interval_is_clopper_pearson(correct, total):
    reference = stats.binomtest(correct, total).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(accuracy_interval(correct, total), (reference.low, reference.high), atol=1e-12)


def test_report_prints_a_table(rows):
    x, y = rows
    text = str(evaluate(KEY, model, x, y, {"fgsm": FGSM}, threat=THREAT))
    assert "clean" in text
    assert "38/43" in text
    assert "88.37%" in text
    assert "worst case" in text
    assert len(table({"clean": [(1, 2), (2, 2)]}, ["one", "two"]).splitlines()) == 3


def test_columns_of_a_table_stand_below_their_heads():
    rows = {"clean": [(100, 100), (10, 100)], "fgsm": [(9, 100), (1000, 10000)]}
    assert table(rows, ["one", "two"]).splitlines() == [
        "                                               one                                    two",
        "                accuracy    95% interval     rows   accuracy    95% interval     rows",
        "clean            100.00%   96.38 - 100.00  100/100    10.00%    4.90 - 17.62   10/100",
        "fgsm               9.00%    4.20 - 16.40   9/100      10.00%    9.42 - 10.60   1000/10000",
    ]


def test_rows_that_do_not_fit_are_refused(rows):
    x, y = rows
    with pytest.raises(ValueError, match="43 rows, 42 classes"):
        evaluate(KEY, model, x, y[:-1], {}, threat=THREAT)
    with pytest.raises(ValueError, match="at least one"):
        evaluate(KEY, model, x[:0], y[:0], {}, threat=THREAT)


def test_an_attack_may_come_jitted(rows):
    x, y = rows
    jitted = jax.jit(FGSM, static_argnums=1)
    for attack in (jitted, jn.attacks.restarts(jitted, 2)):
        report = evaluate(KEY, model, x, y, {"fgsm": attack, "plain": FGSM}, threat=THREAT, batch_size=2)
        np.testing.assert_array_equal(report.survived["fgsm"], report.survived["plain"])
        assert not report.queries


def test_logits_that_are_no_numbers_are_never_right(rows):
    """Their largest is in the first place."""
    x = rows[0]
    report = evaluate(KEY, lambda x: model(x) * jnp.nan, x, np.zeros(43, np.int32), {"fgsm": FGSM}, threat=THREAT)
    assert set(report.accuracies().values()) == {0.0}
    network = jn.from_linen(jn.models.MLP((), classes=2))
    params, stats = network.init(KEY, x)
    batch = jn.types.Batch(x, jnp.zeros(43, int))
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    assert jn.objectives.standard(network)(lost, stats, batch, KEY)[1][1]["accuracy"] == 0


def test_a_model_that_is_wrong_everywhere_is_reported(rows):
    x = rows[0]
    wrong = np.asarray(jnp.argmin(model(x), axis=1))
    report = evaluate(KEY, model, x, wrong, {"fgsm": FGSM}, threat=THREAT)
    assert set(report.accuracies().values()) == {0.0}
    np.testing.assert_array_equal(report.examples["fgsm"], x)
    assert "fgsm" in report.costs()


@pytest.mark.parametrize("bad", [2.0, -0.5, np.nan])
def test_rows_outside_the_box_are_refused(rows, bad):
    x, y = rows
    x = np.where(np.arange(len(x))[:, None] == 7, np.float32(bad), x)
    with pytest.raises(ValueError, match=r"inside the threat's box \[0.0, 1.0\], got values from"):
        evaluate(KEY, model, x, y, {"fgsm": FGSM}, threat=THREAT)


@pytest.mark.parametrize("size", [0, -1, -64])
def test_no_batch_is_of_fewer_rows_than_one(rows, size):
    """Of a negative number of rows none would be attacked, and none right."""
    with pytest.raises(ValueError, match=f"batch_size must be at least 1 row, or None, got {size}"):
        evaluate(KEY, model, *rows, {"fgsm": FGSM}, threat=THREAT, batch_size=size)


@pytest.mark.parametrize("ends", [(-np.inf, np.inf), (0, np.inf)])
def test_a_box_without_an_end_holds_all(rows, ends):
    x, y = rows
    threat = jn.Linf(0.02, *ends)
    attack = partial(jn.attacks.fgsm, threat=threat)
    report = evaluate(KEY, model, x, list(y), {"fgsm": attack}, threat=threat)
    far = np.abs(x.mean(axis=1) - 0.5) > 0.02
    np.testing.assert_array_equal(report.survived["fgsm"], far & report.survived["clean"])
    assert 0 < report.survived["fgsm"].sum() < report.survived["clean"].sum()


@pytest.mark.parametrize("bad", [-1, 2, 1.0])
def test_classes_that_the_model_does_not_have_are_refused(rows, bad):
    x, y = rows
    y = np.append(y[:-1], bad)
    said = rf"takes integer classes from 0 to 1, one for each of 43 rows, got {y.dtype}\[43\] from"
    with pytest.raises(ValueError, match=f"evaluate {said}"):
        evaluate(KEY, model, x, y, {"fgsm": FGSM}, threat=THREAT)
    with pytest.raises(ValueError, match=f"robustness_curve {said}"):
        robustness_curve(KEY, model, x, y, jn.attacks.fgsm, threat=THREAT, epsilons=np.array([0.0, 0.1]))


def test_classes_in_a_column_are_refused(rows):
    """As some data sets have them: they would be taken for distributions over one class."""
    x, y = rows
    with pytest.raises(ValueError, match=r"evaluate takes integer classes .* of 43 rows, got int32\[43, 1\] from"):
        evaluate(KEY, model, x, y[:, None], {}, threat=THREAT)


@pytest.mark.parametrize("name", ["clean", "worst case"])
def test_attacks_do_not_have_the_names_of_other_lines(rows, name):
    with pytest.raises(ValueError, match=f"attacks may not be called {name}"):
        evaluate(KEY, model, *rows, {name: FGSM}, threat=THREAT)


def test_an_epsilon_that_is_no_number_allows_nothing(rows):
    x, _ = rows
    with pytest.raises(InvalidExample, match="leaves the ball"):
        verify("far", np.clip(x + 0.1, 0, 1), x, jn.Linf(np.nan))
    with pytest.raises(ValueError, match="epsilon must be 0 or more, got nan"):
        jn.attacks.pgd(KEY, model, *rows, threat=jn.Linf(np.nan))


def test_epsilons_of_a_curve_must_rise(rows):
    for epsilons in ([0.1, 0.0], [-0.1, 0.1], [0.0, np.nan]):
        with pytest.raises(ValueError, match="epsilons that rise from 0 or more"):
            robustness_curve(KEY, model, *rows, jn.attacks.fgsm, threat=THREAT, epsilons=np.array(epsilons))


def test_rows_of_a_curve_lie_in_the_box(rows):
    x, y = rows
    with pytest.raises(ValueError, match="robustness_curve takes rows inside the threat's box"):
        robustness_curve(KEY, model, 255 * x, y, jn.attacks.fgsm, threat=THREAT, epsilons=np.array([0.0, 0.1]))


def test_rows_in_a_box_of_bytes_and_in_double_precision():
    """Rounding is in proportion to the box; what is cast to single precision has not been attacked."""
    random = np.random.default_rng(0)
    grey = lambda x: jnp.stack([x.mean(1), 255 - x.mean(1)], axis=1)  # noqa: E731
    x = np.round(255 * random.uniform(size=(64, 16))).astype(np.float32)
    for epsilon in (0.3, 2.55, 3.1):
        threat = jn.Linf(epsilon, 0, 255)
        evaluate(KEY, grey, x, np.argmax(grey(x), 1), {"fgsm": partial(jn.attacks.fgsm, threat=threat)}, threat=threat)
    x = random.uniform(size=(16, 6))
    for threat in (jn.L0(3), jn.Masked(np.arange(6) < 3, 0.3)):
        pgd = {"pgd": partial(jn.attacks.pgd, threat=threat, steps=3)}
        assert evaluate(KEY, model, x, np.argmax(model(x), 1), pgd, threat=threat).accuracies()["clean"] == 1


def test_networks_in_half_precision_are_crossed_where_they_round():
    """An attack that sees the logits before they are rounded stops at what the next program calls a tie."""
    net, threat = jn.from_linen(jn.models.MLP((), dtype=jnp.bfloat16)), jn.L2(100.0, lower=-9.0, upper=9.0)
    x = np.random.default_rng(0).uniform(-1, 1, size=(64, 16)).astype(np.float32)
    params, stats = net.init(KEY, x)
    params["Dense_0"]["bias"] += 20.0
    half = net.logits_fn(params, stats)
    y = np.argmax(half(x), axis=-1)
    found = evaluate(KEY, half, x, y, {"ddn": partial(jn.attacks.ddn, threat=threat)}, threat=threat)
    assert found.accuracies() == {"clean": 1.0, "ddn": 0.0, "worst case": 0.0}


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_batches_do_not_matter_with_keys_of_any_kind(rows, kind):
    attack = partial(jn.attacks.fgsm, threat=THREAT, start=jn.attacks.uniform, step_size=0.01)
    key = jax.random.key(0, impl=kind)
    found, other = (
        evaluate(key, model, *rows, {"fgsm": attack}, threat=THREAT, batch_size=size).examples["fgsm"]
        for size in (8, 40)
    )
    np.testing.assert_array_equal(found, other)
    assert len(np.unique(found[5:] - rows[0][5:], axis=0)) == len(found[5:])
