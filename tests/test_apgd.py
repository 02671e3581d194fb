"""Auto-PGD: its traces against numpy, what it reaches on linear models, and what it refuses."""

from functools import partial
from itertools import pairwise

import apgd_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.apgd import apgd, apgd_targeted
from jaxnets.attacks.parts.apgd_steps import _kth_largest, checkpoints, projected_noise
from jaxnets.attacks.parts.calling import row_keys

KEY = jax.random.key(0)
THREATS = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
cross_entropy, dlr, dlr_targeted, margin, targeted = (
    jn.losses.cross_entropy, jn.losses.dlr, jn.losses.dlr_targeted, jn.losses.margin, jn.losses.targeted,
)  # fmt: skip
WIDE = {"lower": -50.0, "upper": 50.0}


def from_here(x_0, keys, threat, x):
    return x_0


def recorded(logits_fn):
    """The model, and every batch that it was shown."""
    seen = []

    def model(x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x, ordered=True)
        return logits_fn(x)

    return model, seen


# The schedule, trap 11.


def test_checkpoints_are_those_of_the_published_code():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in range(1, 1001):
        assert checkpoints(steps) == apgd_reference.looks(steps)


def wave(x):
    """Three maxima, and a longest step that jumps over them."""
    return np.sin(9 * x[0]) + 0.5 * x[0] - 1.5 * (x[0] - 0.2) ** 2


def wave_slope(x):
    return 9 * np.cos(9 * x) + 0.5 - 3 * (x - 0.2)


@pytest.mark.parametrize("order", [np.inf, 2])
def test_trace_on_a_function_of_one_variable(order, x64):
    """The first look compares with the loss at the start, not with a row of zeros; the losses here are negative."""

    def logits(x):
        z = jnp.sin(9 * x) + 0.5 * x - 1.5 * (x - 0.2) ** 2 - 3
        return jnp.concatenate([jnp.zeros_like(x), z], axis=1)

    starts, steps = np.array([[-0.9], [-0.31], [0.0], [0.42], [0.97]]), 40
    model, seen = recorded(logits)
    threat = {np.inf: jn.Linf, 2: jn.L2}[order](1.0, -2.0, 2.0)
    attack = partial(apgd, threat=threat, steps=steps, loss=margin, start=Partial(from_here, jnp.asarray(starts)))
    result = attack(KEY, model, jnp.zeros((5, 1)), jnp.zeros(5, jnp.int32))
    jax.effects_barrier()
    settings = {"epsilon": 1.0, "steps": steps, "lower": -2.0, "upper": 2.0}
    halvings = set()
    for row, x_0 in enumerate(starts):
        trace = apgd_reference.halving(order, wave, wave_slope, np.zeros(1), x_0, **settings)
        iterates, lengths, highest = trace
        # What the model was shown are the iterates; where a row went back it is shown the step from there.
        np.testing.assert_allclose(np.stack(seen)[:, row], iterates, rtol=0, atol=1e-9)
        np.testing.assert_allclose(result[row], highest[-1], rtol=0, atol=1e-9)
        halvings |= {round(a / b) for a, b in pairwise(lengths)}
    assert halvings == {1, 2}


@pytest.fixture(scope="module")
def net():
    return references.TanhMLP(seed=0, inputs=6, hidden=9, classes=4)


def mlp(w1, b1, w2, b2, x):
    return jnp.tanh(x @ w1 + b1) @ w2 + b2


def rows(net, seed=1, count=8):
    random = np.random.default_rng(seed)
    x = np.clip(random.uniform(-0.3, 1.3, size=(count, 6)), 0, 1)
    return x, np.array([net.logits(row).argmax() for row in x]), random


def first_best(net, y, points):
    """Of many points the first that is misclassified with the highest cross-entropy, else the one of the highest."""
    return max(points, key=lambda x: (net.logits(x).argmax() != y, references.cross_entropy(net.logits(x), y)))


# In L2 away from the box: whether a coordinate lies on it, and may not leave it, hangs on the last bit.
@pytest.mark.parametrize("threat", [jn.Linf(0.3), jn.L2(0.8, -2.0, 3.0)], ids=["Linf", "L2"])
def test_trace_on_a_network(net, threat, x64):
    x, y, random = rows(net)
    order, epsilon = references.ORDERS[type(threat).__name__], threat.epsilon
    room = {"epsilon": threat.epsilon, "lower": threat.lower, "upper": threat.upper}
    offsets = random.uniform(-epsilon, epsilon, size=x.shape)
    starts = np.stack([references.project(order, a + b, a, **room) for a, b in zip(x, offsets, strict=True)])
    model, seen = recorded(Partial(mlp, *map(jnp.asarray, net.arrays())))
    attack = partial(apgd, threat=threat, steps=30, start=Partial(from_here, jnp.asarray(starts)))
    result = attack(KEY, model, jnp.asarray(x), jnp.asarray(y))
    jax.effects_barrier()
    for row in range(len(x)):
        loss = lambda z: references.cross_entropy(net.logits(z), y[row])  # noqa: B023, E731
        slope = lambda z: net.cross_entropy_gradient(z, y[row])  # noqa: B023, E731
        iterates, _, _ = apgd_reference.halving(order, loss, slope, x[row], starts[row], steps=30, **room)
        np.testing.assert_allclose(np.stack(seen)[:, row], iterates, rtol=0, atol=1e-7)
        np.testing.assert_allclose(result[row], first_best(net, y[row], iterates), rtol=0, atol=1e-7)


def test_trace_in_l1(net, x64):
    """Three phases, in balls of 3, 2 and 1 epsilon, each from where the one before had the highest loss."""
    x, y, _ = rows(net)
    steps, model_and_seen = 60, recorded(Partial(mlp, *map(jnp.asarray, net.arrays())))
    starts = np.asarray(projected_noise(row_keys(KEY, len(x)), jn.L1(1.2), jnp.asarray(x)))
    model, seen = model_and_seen
    attack = partial(apgd, threat=jn.L1(0.4), steps=steps, start=Partial(from_here, jnp.asarray(starts)))
    result = attack(KEY, model, jnp.asarray(x), jnp.asarray(y))
    jax.effects_barrier()
    counts, inside = set(), []
    for row in range(len(x)):
        loss = lambda z: references.cross_entropy(net.logits(z), y[row])  # noqa: B023, E731
        slope = lambda z: net.cross_entropy_gradient(z, y[row])  # noqa: B023, E731
        x_0, shown = starts[row], []
        for number, width in ((18, 3), (18, 2), (24, 1)):
            x_0 = references.project(1, x_0, x[row], 0.4 * width, 0, 1)
            settings = {"epsilon": 0.4 * width, "steps": number, "every": 1, "lower": 0, "upper": 1}
            iterates, entries, _, highest = apgd_reference.sparse(loss, slope, x[row], x_0, **settings)
            shown += iterates
            x_0 = highest[-1]
            counts |= set(entries)
        np.testing.assert_allclose(np.stack(seen)[:, row], shown, rtol=0, atol=1e-7)
        np.testing.assert_allclose(result[row], first_best(net, y[row], iterates), rtol=0, atol=1e-7)
        inside.append(np.abs(shown[-1] - x[row]).sum())
    assert len(counts) >= 3
    assert max(inside) > 0.39


def test_kth_largest():
    random = np.random.default_rng(0)
    sizes = np.abs(random.normal(size=40) * 10.0 ** random.integers(-30, 30, 40)).astype(np.float32)
    sizes[:5], sizes[5:8] = 0, sizes[8]
    found = jax.jit(jax.vmap(_kth_largest, in_axes=(None, 0)))(jnp.asarray(sizes), jnp.arange(1, 41))
    np.testing.assert_array_equal(found, np.sort(sizes)[::-1])


# What it reaches.


@every_threat
def test_gain_on_a_linear_model(cls):
    random = np.random.default_rng(3)
    x, y = random.normal(size=(6, 20)).astype(np.float32), random.integers(0, 2, 6)
    weights = random.normal(size=(20, 2))
    logits_fn = Partial(lambda w, x: x @ w, jnp.asarray(weights, jnp.float32))
    result = apgd(KEY, logits_fn, jnp.asarray(x), jnp.asarray(y), threat=cls(0.5, **WIDE), steps=40, loss=margin)
    towards = np.where(y == 0, 1, -1)[:, None] * (weights[:, 1] - weights[:, 0])
    gain = ((np.asarray(result, np.float64) - x) * towards).sum(axis=1)
    best = 0.5 * np.linalg.norm(towards[0], references.dual(references.ORDERS[cls.__name__]))
    assert (gain >= 0.97 * best).all()
    assert (gain <= (1 + 1e-5) * best).all()


def wavy(seed=0, classes=5):
    random = np.random.default_rng(seed)
    x = jnp.asarray(np.clip(random.uniform(-0.3, 1.3, size=(8, 6)), 0, 1), jnp.float32)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((6, 12), (12, classes))]
    logits_fn = Partial(lambda a, b, x: jnp.sin(3 * x @ a) @ b, *arrays)
    return x, jnp.argmax(logits_fn(x), axis=1), logits_fn


@every_threat
def test_targeted_apgd_is_the_best_of_apgd_towards_each_class(cls):
    x, y, logits_fn = wavy()
    threat = cls(jnp.full(8, {"Linf": 0.02, "L2": 0.05, "L1": 0.1}[cls.__name__]))
    start = jn.attacks.at_clean
    together = apgd_targeted(KEY, logits_fn, x, y, threat=threat, steps=8, classes=3, start=start)
    references.assert_inside(threat, together, x)
    order = np.argsort(-np.where(np.arange(5) == np.asarray(y)[:, None], -np.inf, np.asarray(logits_fn(x))), axis=1)
    each, ranks = [], []
    for place in range(3):
        loss = Partial(dlr_targeted, wanted=jnp.asarray(order[:, place]))
        each.append(apgd(KEY, logits_fn, x, y, threat=threat, steps=8, loss=loss, start=start))
        fooled = jn.losses.succeeded(loss, logits_fn(each[-1]), y)
        ranks.append(list(zip(np.asarray(fooled), np.asarray(loss(logits_fn(each[-1]), y)), strict=True)))
    for row in range(8):
        best = max(range(3), key=lambda place: ranks[place][row])
        np.testing.assert_allclose(together[row], each[best][row], atol=1e-5)


def test_targeted_apgd_counts_any_other_class_as_success():
    """Class 2 is unreachable; on the way there class 1 wins."""

    def logits(x):
        zero = jnp.zeros_like(x)
        return jnp.concatenate([zero + 0.5, x, x - 9, zero - 20, zero - 20], axis=1)

    x, y = jnp.full((1, 1), 0.4), jnp.array([0])
    loss = Partial(dlr_targeted, wanted=jnp.array([2]))
    assert apgd(KEY, logits, x, y, threat=jn.Linf(0.3), steps=5, loss=loss)[0, 0] > 0.5


def test_a_targeted_loss_reaches_its_class():
    x, y, logits_fn = wavy()
    wanted = (y + 1) % 5
    result = apgd(KEY, logits_fn, x, wanted, threat=jn.Linf(0.9), steps=30, loss=targeted(cross_entropy))
    assert (jnp.argmax(logits_fn(result), axis=1) == wanted).sum() >= 6


@pytest.mark.slow
def test_a_row_of_its_own_and_an_epsilon_of_its_own():
    x, y, logits_fn = wavy()
    keys, epsilons = row_keys(KEY, 8), jnp.linspace(0, 0.4, 8)
    for attack in (partial(apgd, steps=9, loss=margin), partial(apgd_targeted, steps=9, classes=2)):
        together = attack(keys, logits_fn, x, y, threat=jn.L1(epsilons))
        np.testing.assert_array_equal(together[0], x[0])
        alone = attack(keys[3:4], logits_fn, x[3:4], y[3:4], threat=jn.L1(epsilons[3]))
        np.testing.assert_allclose(together[3:4], alone, atol=1e-5)


# Degenerate models.


def flat(kind, x):
    """Constant logits; NaN logits; finite logits with NaN gradients."""
    kinds = (
        lambda x: jnp.zeros((len(x), 5)),
        lambda x: jnp.full((len(x), 5), jnp.nan) + x[:, :1],
        lambda x: jnp.sqrt(x[:, :1] * 0) + jnp.arange(5.0),
    )
    return jax.lax.switch(kind, kinds, x)


@pytest.mark.slow
@every_threat
def test_models_without_gradients(cls):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(4, 6)), jnp.float32)
    for kind in range(3):
        for attack in (apgd, partial(apgd_targeted, classes=4)):
            result = attack(KEY, Partial(flat, kind), x, jnp.arange(4), threat=cls(0.7), steps=12)
            references.assert_inside(cls(0.7), result, x)


@pytest.mark.parametrize(("cls", "steps"), [(jn.Linf, 1), (jn.L2, 1), (jn.L1, 1), (jn.L1, 2), (jn.L1, 4)])
def test_few_steps(cls, steps):
    x, y, logits_fn = wavy()
    result = apgd(KEY, logits_fn, x, y, threat=cls(0.3), steps=steps)
    references.assert_inside(cls(0.3), result, x)
    assert (cross_entropy(logits_fn(result), y) > cross_entropy(logits_fn(x), y)).sum() >= 4


def test_a_start_outside_is_projected_before_its_gradient():
    x, y = jnp.zeros((6, 3)), jnp.zeros(6, jnp.int32)
    model, seen = recorded(lambda x: jnp.concatenate([x.sum(axis=1, keepdims=True), jnp.zeros((len(x), 1))], axis=1))
    apgd(KEY, model, x, y, threat=jn.Linf(0.3), steps=2, start=jn.attacks.uniform_unclipped)
    jax.effects_barrier()
    assert min(batch.min() for batch in seen) >= 0


# Losses and what is refused.


def test_targeted_dlr_against_its_definition():
    random = np.random.default_rng(0)
    z, y, t = random.normal(size=(50, 6)), random.integers(0, 6, 50), random.integers(0, 6, 50)
    falling = -np.sort(-z, axis=1)
    every = np.arange(50)
    expected = (z[every, t] - z[every, y]) / (falling[:, 0] - (falling[:, 2] + falling[:, 3]) / 2)
    computed = dlr_targeted(*map(jnp.asarray, (z.astype(np.float32), y, t)))
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-6)
    rescaled = dlr_targeted(1e3 * z.astype(np.float32) - 40, jnp.asarray(y), jnp.asarray(t))
    np.testing.assert_allclose(rescaled, expected, rtol=1e-3, atol=1e-5)
    ties = jnp.zeros((2, 4))
    assert np.isfinite(jax.jacobian(dlr_targeted)(ties, jnp.array([0, 1]), jnp.array([1, 2]))).all()


def test_bad_arguments_raise():
    x, y, logits_fn = wavy(classes=3)
    with pytest.raises(ValueError, match=r"apgd takes at least one step, got steps=0"):
        apgd(KEY, logits_fn, x, y, threat=jn.Linf(0.1), steps=0)
    with pytest.raises(ValueError, match=r"apgd takes an Linf, L2 or L1 threat, got L0"):
        apgd(KEY, logits_fn, x, y, threat=jn.L0(1))
    with pytest.raises(ValueError, match="dlr_targeted needs at least 4 classes"):
        apgd_targeted(KEY, logits_fn, x, y, threat=jn.Linf(0.1), classes=2)
    for classes in (0, 3):
        with pytest.raises(ValueError, match=f"2 other classes in logits of shape .*, got classes={classes}"):
            apgd_targeted(KEY, logits_fn, x, y, threat=jn.Linf(0.1), classes=classes)
    with pytest.raises(ValueError, match="needs integer classes"):
        apgd_targeted(KEY, logits_fn, x, jnp.zeros((8, 3)), threat=jn.Linf(0.1))


@pytest.mark.parametrize("cls", [jn.Linf, *(pytest.param(cls, marks=pytest.mark.slow) for cls in (jn.L2, jn.L1))])
def test_gradients_at_any_scale_give_the_same_steps(cls):
    """Trap 2; trap 3 is one of scale too."""
    random = np.random.default_rng(0)
    first, second = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((6, 9), (9, 3)))
    x, y = jnp.asarray(random.uniform(0.3, 0.7, size=(8, 6)), jnp.float32), jnp.zeros(8, jnp.int32)

    def model(scale):
        return Partial(lambda scale, a, b, x: scale * (jnp.tanh(x @ a) @ b), jnp.float32(scale), first, second)

    attack = partial(apgd, threat=cls(0.3), steps=20, loss=margin)
    expected = attack(KEY, model(1.0), x, y)
    assert (expected != x).any()
    for scale in (2.0**-60, 2.0**-20, 2.0**20, 2.0**60):
        np.testing.assert_allclose(attack(KEY, model(scale), x, y), expected, atol=1e-5)
