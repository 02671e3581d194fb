"""Certified training and certificates beside attacks: values and gradients by hand, and bounds that never cross."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from finite_differences import assert_slope

import jaxnets as jn
from jaxnets.certificates import box, certified, crown_margins, interval_margins
from jaxnets.evaluation import CrossedBounds, evaluate
from jaxnets.objectives import crown_ibp, ibp, standard
from jaxnets.training import init_state, make_step, scheduled
from jaxnets.types import Batch

KEY = jax.random.key(0)
THREAT = jn.Linf(0.05)
NET = jn.from_linen(jn.models.MLP((7,), 3))


def problem(rows=6, inputs=4, dtype=np.float64):
    random = np.random.default_rng(0)
    x, y = random.uniform(0.02, 0.98, (rows, inputs)).astype(dtype), random.integers(0, 3, rows)
    shapes = jax.eval_shape(NET.init, KEY, x)[0]
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(dtype), shapes)
    return params, Batch(jnp.asarray(x), jnp.asarray(y))


# Objectives.


def cross_entropy(logits, y):
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[range(len(y)), y])


def value_by_hand(params, x, y, *, epsilon, kappa, beta):
    """One hidden layer, row by row, as sums over units: the planes or the boxes of ReLU between l and u."""
    (W, b), (V, c) = ([np.asarray(params[layer][part]) for part in ("kernel", "bias")] for layer in sorted(params))
    lower, upper = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    worst = np.zeros((len(x), V.shape[1]))
    for row, label in enumerate(y):
        middle, radius = (lower[row] + upper[row]) / 2 @ W + b, (upper[row] - lower[row]) / 2 @ np.abs(W)
        low, high = middle - radius, middle + radius
        for other in set(range(V.shape[1])) - {label}:
            v, shift = V[:, label] - V[:, other], c[label] - c[other]
            boxes = shift + sum(np.where(v > 0, v * np.maximum(low, 0), v * np.maximum(high, 0)))
            slope, intercept = np.zeros_like(v), 0.0
            for unit in range(len(v)):
                if low[unit] >= 0:
                    slope[unit] = 1
                elif high[unit] > 0 and v[unit] > 0:
                    slope[unit] = high[unit] > -low[unit]
                elif high[unit] > 0:
                    slope[unit] = high[unit] / (high[unit] - low[unit])
                    intercept -= v[unit] * slope[unit] * low[unit]
            A = W @ (v * slope)
            planes = shift + intercept + v * slope @ b + sum(np.where(A > 0, A * lower[row], A * upper[row]))
            worst[row, other] = -((1 - beta) * boxes + beta * planes)
    logits = np.maximum(x @ W + b, 0) @ V + c
    return kappa * cross_entropy(logits, y) + (1 - kappa) * cross_entropy(worst, y), logits, worst


OBJECTIVES = {
    "ibp": (ibp(NET, THREAT, kappa=0.3), 0.0),
    "crown_ibp": (crown_ibp(NET, THREAT, kappa=0.3, beta=0.4), 0.4),
    "crown_ibp at its end": (crown_ibp(NET, THREAT, kappa=0.3, beta=jnp.zeros(())), 0.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_against_numpy(name, x64):
    (objective, beta), (params, batch) = OBJECTIVES[name], problem()
    x, y = map(np.asarray, batch)
    by_hand = partial(value_by_hand, x=x, y=y, epsilon=0.05, kappa=0.3, beta=beta)
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, (_, metrics)), gradient = run(params, {}, batch, KEY)
    expected, logits, worst = by_hand(params)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == y).mean())
    held = (worst + np.eye(3)[y] * -9 < 0).all(axis=1)
    np.testing.assert_allclose(metrics["certified"], held.mean())
    assert 0 < held.mean() < 1
    random = np.random.default_rng(3)
    for _ in range(4):
        assert_slope(lambda params: by_hand(params)[0], gradient, params, random, rtol=1e-6)


class Normed(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(jn.models.layers.BatchNorm()(nn.Dense(6)(x), train))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_without_a_threat_and_bounds_it_is_standard():
    """Value, gradient, metrics and statistics; the bounds are taken at the statistics from before the step."""
    net, (_, batch) = jn.from_linen(Normed()), problem(dtype=np.float32)
    params, stats = jax.jit(net.init)(KEY, batch.x)
    stats = jax.tree.map(lambda leaf: leaf + 0.5, stats)

    @jax.jit
    def run(params, stats):
        of = lambda objective: jax.value_and_grad(objective, has_aux=True)(params, stats, batch, KEY)  # noqa: E731
        model = net.logits_fn(params, stats)
        bounded = jnp.mean(jn.losses.cross_entropy(model(batch.x), batch.y))
        kinds = [standard(net), ibp(net, jn.Linf(0.0), kappa=1.0), ibp(net, jn.Linf(0.0), kappa=0.0)]
        return [of(kind) for kind in kinds], bounded

    (plain, alike, worst), bounded = run(params, stats)
    assert alike[0][1][1].pop("certified") <= 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), plain, alike)
    jax.tree.map(np.testing.assert_array_equal, plain[0][1][0], worst[0][1][0])
    np.testing.assert_allclose(worst[0][0], bounded, rtol=1e-5)
    assert abs(plain[0][0] - bounded) > 1e-3


@pytest.mark.parametrize("make", [ibp, partial(crown_ibp, beta=1.0)])
def test_the_bound_of_the_loss_is_above_every_attack(make):
    params, batch = problem(dtype=np.float32)
    bound = make(NET, THREAT, kappa=0.0)(params, {}, batch, KEY)[0]
    model = NET.logits_fn(params, {})
    x_adv = jn.attacks.pgd(KEY, model, *batch, threat=THREAT, steps=10)
    attacked = jnp.mean(jn.losses.cross_entropy(model(x_adv), batch.y))
    clean = jnp.mean(jn.losses.cross_entropy(model(batch.x), batch.y))
    assert clean < attacked < bound


def test_schedules_follow_the_steps_without_a_new_trace():
    params, batch = problem(dtype=np.float32)
    traces = []

    def objective_at(step):
        traces.append(0)
        return ibp(NET, jn.Linf(0.01 * step), kappa=1 - 0.1 * step)

    step = jax.jit(scheduled(lambda t: make_step(objective_at(t), optax.sgd(0.0))))
    state = init_state(KEY, params, {}, optax.sgd(0.0))
    values = []
    for _ in range(3):
        state, metrics = step(state, batch)
        values.append(metrics["loss"])
    assert len(traces) == 1
    expected = [ibp(NET, jn.Linf(0.01 * t), kappa=1 - 0.1 * t)(params, {}, batch, KEY)[0] for t in range(3)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert np.ptp(values) > 0.01


# Certificates.


@pytest.fixture(scope="module")
def trained():
    """A network trained to be certified around two kinds of points, and points of both, some near the other kind."""
    random = np.random.default_rng(0)
    x = random.uniform(0, 1, (256, 2)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 1).astype(np.int32)
    net = jn.from_linen(jn.models.MLP((16, 16), 2))
    epsilon = optax.linear_schedule(0.0, 0.05, 100)
    objective = lambda t: crown_ibp(net, jn.Linf(epsilon(t)), kappa=0.5, beta=1 - epsilon(t) / 0.05)  # noqa: E731
    optimizer = optax.adam(1e-2)
    state = init_state(KEY, *net.init(KEY, x), optimizer)
    step = jax.jit(scheduled(lambda t: make_step(objective(t), optimizer)))
    for _ in range(200):
        state, metrics = step(state, Batch(jnp.asarray(x), jnp.asarray(y)))
    return net.logits_fn(state.params, state.stats), x, y, metrics


CERTIFICATES = {
    "intervals": partial(certified, threat=THREAT, margins=interval_margins),
    "crown": partial(certified, threat=THREAT, margins=crown_margins),
    "tightest": partial(certified, threat=THREAT),
}
ATTACKS = {
    "pgd": partial(jn.attacks.pgd, threat=THREAT, steps=20, loss=jn.losses.margin),
    "apgd": partial(jn.attacks.apgd, threat=THREAT, steps=20),
}


def test_certified_and_attacked_accuracy_never_cross(trained):
    model, x, y, metrics = trained
    report = evaluate(KEY, model, x[:100], y[:100], ATTACKS, threat=THREAT, certificates=CERTIFICATES, batch_size=64)
    survived = report.with_worst_case()["worst case"]
    for name, held in report.certified.items():
        assert (held <= survived).all()
        assert 0.5 < held.mean() < 1, name
    assert (report.certified["tightest"] >= report.certified["intervals"] | report.certified["crown"]).all()
    low, high = report.bounds()
    assert low == report.certified["tightest"].mean() <= high == survived.mean() < report.accuracies()["clean"]
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[-4:]] == ["worst case", *(f"certified: {n}" for n in CERTIFICATES)]
    assert abs(float(metrics["certified"]) - report.certified["intervals"].mean()) < 0.2
    # Of a network that no point near the border can fool, the two meet.
    assert high - low < 0.2


def test_a_certificate_of_a_broken_row_is_an_error(trained):
    model, x, y, _ = trained
    everything = {"wishful": lambda logits_fn, x, y: jnp.ones(len(x), bool)}
    with pytest.raises(CrossedBounds, match=r"certified by 'wishful' and wrong under 'clean|pgd'.*Linf\(epsilon=0.05"):
        evaluate(KEY, model, x[:100], y[:100], ATTACKS, threat=THREAT, certificates=everything)
    smaller = {"of another threat": partial(certified, threat=jn.Linf(0.001))}
    with pytest.raises(CrossedBounds, match="'of another threat' and wrong under 'pgd'"):
        evaluate(KEY, model, x[:100], y[:100], ATTACKS, threat=THREAT, certificates=smaller)


def test_without_certificates_the_lower_bound_is_zero(trained):
    model, x, y, _ = trained
    report = evaluate(KEY, model, x[:20], y[:20], {}, threat=THREAT)
    assert report.bounds() == (0.0, report.accuracies()["clean"])
    assert "certified" not in str(report)


def test_wrong_rows_are_not_certified(trained):
    model, x, y, _ = trained
    right = np.asarray(certified(model, x, y, threat=THREAT))
    wrong = np.asarray(certified(model, x, 1 - y, threat=THREAT))
    predicted = np.asarray(model(x)).argmax(1)
    assert (predicted == y)[right].all()
    assert (predicted != y)[wrong].all()
    assert not (right & wrong).any()


def test_under_a_mask_more_is_certified(trained):
    model, x, y, _ = trained
    masked = jn.Masked(np.array([True, False]), 0.05)
    some, few = (np.asarray(certified(model, x, y, threat=threat)) for threat in (masked, THREAT))
    assert (some >= few).all()
    assert some.sum() > few.sum()


def test_slack_is_a_share_of_the_logits():
    x, y = jnp.array([[0.5, 0.2]]), jnp.array([0])
    for scale in (1e-3, 1e3):
        network = lambda x, scale=scale: scale * x  # noqa: E731
        for slack, expected in ((0.16, True), (0.17, False)):  # 0.1 of the 0.6 that the larger logit may be
            held = certified(network, x, y, threat=jn.Linf(0.1), slack=slack)
            assert bool(held[0]) == expected


def test_no_certificate_where_bounds_are_no_numbers():
    network = lambda x: jnp.stack([jnp.log(x[:, 0] - 0.5), x[:, 0] - 9], axis=1)  # noqa: E731
    x, y = jnp.array([[0.52], [0.8]]), jnp.array([0, 0])
    np.testing.assert_array_equal(certified(network, x, y, threat=THREAT), [False, True])


@pytest.mark.parametrize("margins", [interval_margins, crown_margins])
def test_rounding_of_bounds_as_wide_as_exponentials_certifies_nothing(margins):
    """Behind a softmax margins are differences of numbers such as 1e30: above zero by nothing but rounding."""
    random = np.random.default_rng(0)
    x = random.uniform(0.3, 0.7, size=(64, 4)).astype(np.float32)
    corners = 0.3 * np.array(list(itertools.product((-1, 1), repeat=4)), np.float32)
    above = broken = 0
    for _ in range(20):
        A, B = (random.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4, 2)))
        model = jax.tree_util.Partial(lambda A, B, x: jax.nn.softmax(20 * x @ A) @ B, A, B)
        y = jnp.argmax(model(x), axis=1)
        held = certified(model, x, y, threat=jn.Linf(0.3), margins=margins)
        wrong = (jnp.argmax(model(jnp.concatenate(x + corners[:, None])), axis=1).reshape(16, -1) != y).any(axis=0)
        above += int(jnp.sum(wrong & jnp.any(margins(model, x - 0.3, x + 0.3, y) > 0, axis=1)))
        broken += int(jnp.sum(held & wrong))
    assert above > 0
    assert broken == 0


def test_a_network_in_less_than_single_precision_is_refused_and_its_rows_are_not():
    x, y = jnp.array([[0.75]], jnp.bfloat16), jnp.array([0])
    network = lambda x: jnp.stack([x[:, 0], 0 * x[:, 0] + 0.749], axis=1)  # noqa: E731
    with pytest.raises(ValueError, match=r"computes in bfloat16.*certify it in float32"):
        certified(lambda x: network(x.astype(jnp.bfloat16)), x, y, threat=jn.Linf(0.1))
    # In bfloat16 0.75 - 0.0019 is 0.75.
    assert not certified(network, x, y, threat=jn.Linf(0.0019))[0]
    assert certified(network, x, y, threat=jn.Linf(0.0009))[0]


def test_no_row_is_of_a_class_that_there_is_not():
    found = certified(lambda x: x - 10, jnp.ones((3, 2)) * jnp.array([9, 0]), jnp.array([0, -1, 2]), threat=THREAT)
    np.testing.assert_array_equal(found, [True, False, False])


def test_other_threats_are_refused():
    with pytest.raises(ValueError, match=r"bounds in Linf, Masked, L2, L1, got L0\(epsilon=3"):
        box(jn.L0(3), jnp.ones((1, 2)))


@pytest.mark.parametrize("margins", [interval_margins, crown_margins])
def test_single_precision_is_well_inside_the_slack(margins):
    """In one box, against double precision."""
    random = np.random.default_rng(0)
    x, y = random.uniform(size=(4, 64)), np.array([3, 1, 0, 2])
    net = jn.from_linen(jn.models.MLP((100, 100)))
    shapes = jax.eval_shape(net.init, KEY, x)[0]
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32) / 10, shapes)
    ends = box(jn.Linf(0.002), jnp.asarray(x, jnp.float32))

    def at(dtype):
        model = net.logits_fn(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params), {})
        return np.asarray(margins(model, *(jnp.asarray(end, dtype) for end in ends), jnp.asarray(y)))

    single = at(jnp.float32)
    with jax.enable_x64(True):
        double = at(jnp.float64)
    assert (np.abs(single - double).max(1) < 2e-6 * np.abs(double).max(1)).all()


@pytest.mark.slow
def test_trained_on_bounds_a_network_is_certified_and_trained_on_attacks_it_is_not():
    digits, threat = jn.data.load("digits"), jn.Linf(0.1)
    train, test = (jn.data.to_float(split.images) for split in (digits.train, digits.test))
    net, optimizer = jn.from_linen(jn.models.SmallCNN()), optax.adam(1e-3)
    epsilon, kappa = optax.linear_schedule(0.0, 0.1, 500, 100), optax.linear_schedule(1.0, 0.5, 500, 100)
    pgd = partial(jn.attacks.pgd, threat=threat, steps=7)
    reports = {}
    for name, objective in {
        "bounds": lambda t: ibp(net, jn.Linf(epsilon(t)), kappa=kappa(t)),
        "attacks": lambda t: jn.objectives.adversarial(net, pgd),
    }.items():
        params, stats = jax.jit(net.init)(KEY, train[:1])
        state = init_state(KEY, params, stats, optimizer)
        step = jax.jit(scheduled(lambda t, objective=objective: make_step(objective(t), optimizer)))
        for number in range(800):
            rows = jn.data.batch_indices(KEY, number, len(train), 100)
            state, _ = step(state, Batch(train[rows], digits.train.labels[rows]))
        model = net.logits_fn(state.params, state.stats)
        strong = {"pgd": partial(jn.attacks.pgd, threat=threat, loss=jn.losses.margin)}
        proof = {"certified": partial(certified, threat=threat)}
        reports[name] = evaluate(KEY, model, test, digits.test.labels, strong, threat=threat, certificates=proof)
    low, high = reports["bounds"].bounds()
    assert low > 0.5
    assert low <= high < reports["bounds"].accuracies()["clean"]
    low, high = reports["attacks"].bounds()
    assert low < 0.1 < 0.7 < high
