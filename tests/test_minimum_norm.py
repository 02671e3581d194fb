"""What DDN, FMN and sigma-zero promise alike: the nearest boundary, rows that do not see each other, no NaN."""

from functools import partial

import jax
import jax.numpy as jnp
import nearest_boundary
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.ddn import ddn
from jaxnets.attacks.fmn import fmn
from jaxnets.attacks.parts.minimum_norm import unit_step
from jaxnets.attacks.parts.stochastic import Stochastic
from jaxnets.attacks.sigma_zero import sigma_zero

ATTACKS = {
    "ddn": (partial(ddn, steps=200), jn.L2),
    "fmn-Linf": (partial(fmn, steps=200), jn.Linf),
    "fmn-L2": (partial(fmn, steps=200), jn.L2),
    "fmn-L1": (partial(fmn, steps=200), jn.L1),
    "fmn-L0": (partial(fmn, steps=200), jn.L0),
    "sigma_zero": (partial(sigma_zero, steps=400), jn.L0),
}
NEAREST = ATTACKS | {
    "deepfool-Linf": (partial(jn.attacks.deepfool, steps=50), jn.Linf),
    "deepfool-L2": (partial(jn.attacks.deepfool, steps=50), jn.L2),
    "fab-Linf": (jn.attacks.fab, jn.Linf),
    "fab-L2": (jn.attacks.fab, jn.L2),
    "fab-L1": (jn.attacks.fab, jn.L1),
    "fab_targeted-Linf": (jn.attacks.fab_targeted, jn.Linf),
    "fab_targeted-L2": (jn.attacks.fab_targeted, jn.L2),
    "fab_targeted-L1": (jn.attacks.fab_targeted, jn.L1),
    "carlini_wagner-L2": (partial(jn.attacks.carlini_wagner, steps=300, initial_const=0.01, rounds=12), jn.L2),
    "carlini_wagner-Linf": (partial(jn.attacks.carlini_wagner, steps=600, step_size=0.001, shrink=0.95), jn.Linf),
    "ead-L1": (partial(jn.attacks.ead, steps=400, beta=0.03), jn.L1),
    "lbfgs-L2": (jn.attacks.lbfgs, jn.L2),
}
"""Those that are tested for how near they come here, and for the rest in files of their own."""
every_attack = pytest.mark.parametrize("name", ATTACKS)
every_nearest = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ATTACKS else pytest.mark.slow) for name in NEAREST]
)
targeted = jn.losses.targeted
KEY = jax.random.key(0)
ROWS, N, CLASSES = 8, 30, 2
LOSSES = {"ddn": jn.losses.cross_entropy}


def linear(weights, bias, x):
    return x @ weights + bias


def logits_of(weights, bias, scale=1.0):
    return Partial(linear, jnp.asarray(scale * weights, jnp.float32), jnp.asarray(scale * bias, jnp.float32))


def order_of(name):
    return references.ORDERS[NEAREST[name][1].__name__]


def scene(binding, seed=0, classes=CLASSES):
    """Rows, classes, and a linear model; ``binding`` rows lie near the box's faces and far from the boundary."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(N, classes))
    if binding:
        x = np.clip(random.uniform(-0.5, 1.5, size=(ROWS, N)), 0, 1)
        bias = np.zeros(classes)
    else:
        x = random.uniform(0.2, 0.8, size=(ROWS, N))
        bias = -0.5 * weights.sum(axis=0)
    x = np.asarray(x, np.float32).astype(np.float64)
    return x, np.argmax(x @ weights + bias, axis=1), weights, bias


def run(name, x, y, logits_fn, epsilon=jnp.inf, key=KEY, **options):
    attack, cls = NEAREST[name]
    box = {edge: options.pop(edge) for edge in ("lower", "upper") if edge in options}
    x = x if isinstance(x, jax.Array) else jnp.asarray(x, jnp.float32)
    return attack(key, logits_fn, x, jnp.asarray(y), threat=cls(epsilon, **box), **options)


def sizes(name, x_adv, x):
    return references.norm(order_of(name), np.asarray(x_adv, np.float64) - np.asarray(jnp.asarray(x, jnp.float32)))


def leads(weights, bias, x, classes):
    """By how much each row's class leads the other one; single precision lands on the boundary but for rounding."""
    logits = linear(weights, bias, np.asarray(x, np.float64))
    return np.diff(logits, axis=1)[:, 0] * np.where(classes == 1, 1, -1)


def assert_nearest(name, found, best):
    """Within 5%. Of coordinates, whose choice is combinatorial, within a quarter and in all 15% too many."""
    assert (best > 0).all()
    assert (found >= best * (1 - 1e-4)).all(), "nearer than the boundary"
    if order_of(name) == 0:
        assert (found <= np.ceil(1.25 * best)).all()
        assert found.sum() <= 1.15 * best.sum()
    else:
        np.testing.assert_array_less(found, 1.05 * best)


@every_nearest
@pytest.mark.parametrize("binding", [False, True], ids=["inside", "box"])
def test_nearest_boundary_of_a_linear_model(name, binding):
    x, y, weights, bias = scene(binding)
    best = np.array(
        [nearest_boundary.of_classes(order_of(name), weights, bias, *row) for row in zip(x, y, strict=True)]
    )
    free = [nearest_boundary.of_classes(order_of(name), weights, bias, *row, -99, 99) for row in zip(x, y, strict=True)]
    assert (best > 1.02 * np.array(free)).any() or not binding or order_of(name) == np.inf
    x_adv = run(name, x, y, logits_of(weights, bias))
    assert (leads(weights, bias, x_adv, 1 - y) > -1e-5).all()
    references.assert_inside(NEAREST[name][1](np.inf), x_adv, x)
    assert_nearest(name, sizes(name, x_adv, x), best)


def folded(weights, x):
    """Two parallel walls: class 1 where ``u = 4 w . (x - 1/2) / sum |w|`` exceeds 0.6, or is under -1.4."""
    u = 4 * (x - 0.5) @ weights / jnp.abs(weights).sum()
    margin = jnp.maximum(2 * u, -u) - jnp.maximum(0.2 + u, 0) + 0.2
    return jnp.stack([jnp.full_like(u, 0.6), margin], axis=1)


@every_nearest
def test_nearest_boundary_of_a_piecewise_linear_model(name):
    """A hinge lies between the row and the wall on the far side, and another one this side of it."""
    random = np.random.default_rng(3)
    weights = random.normal(size=N)
    unit = 4 * weights / np.abs(weights).sum()
    x = np.clip(0.5 + 0.01 * np.sign(weights) + random.normal(0, 0.1, size=(ROWS, N)), 0, 1)
    x = x[np.argsort(-(x - 0.5) @ unit)].astype(np.float32).astype(np.float64)
    u = (x - 0.5) @ unit
    # The margin 2 u - u = u reaches 0.6 at u = 0.6.
    near = u > 0.01
    best = np.array(
        [nearest_boundary.to_halfspace(order_of(name), unit, 0.6 - v, z, 0, 1) for z, v in zip(x, u, strict=True)]
    )
    x_adv = run(name, x, np.zeros(ROWS, int), Partial(folded, jnp.asarray(weights, jnp.float32)))
    assert near.sum() >= 4
    assert_nearest(name, sizes(name, x_adv, x)[near], best[near])


@every_attack
def test_targeted(name):
    """Trap 20: the class wanted, rows that are there already, and the distance to it."""
    x, y, weights, bias = scene(False, seed=1)
    wanted = (y + np.arange(ROWS) % CLASSES) % CLASSES
    loss = targeted(LOSSES.get(name, jn.losses.margin))
    x_adv = np.asarray(run(name, x, wanted, logits_of(weights, bias), loss=loss))
    assert (leads(weights, bias, x_adv, wanted) > -1e-5).all()
    there = wanted == y
    np.testing.assert_array_equal(x_adv[there], np.float32(x)[there])
    rows = zip(x[~there], y[~there], strict=True)
    best = np.array([nearest_boundary.of_classes(order_of(name), weights, bias, *row) for row in rows])
    assert_nearest(name, sizes(name, x_adv, x)[~there], best)


@every_attack
def test_a_row_that_is_wrong_already_stays_as_it_is(name):
    x, y, weights, bias = scene(True)
    wrong = np.where(np.arange(ROWS) % 2, y, (y + 1) % CLASSES)
    x_adv = run(name, x, wrong, logits_of(weights, bias))
    np.testing.assert_array_equal(np.asarray(x_adv)[::2], np.float32(x)[::2])
    assert (sizes(name, x_adv, x)[1::2] > 0).all()


@every_attack
def test_epsilon_limits_what_is_returned_row_by_row(name):
    x, y, weights, bias = scene(True)
    free = run(name, x, y, logits_of(weights, bias))
    size = sizes(name, free, x)
    median = np.median(size) if order_of(name) else np.floor(np.median(size))
    for epsilon in (median, jnp.full(ROWS, median), 0.0):
        x_adv = run(name, x, y, logits_of(weights, bias), epsilon=epsilon)
        inside = size <= np.asarray(epsilon)
        np.testing.assert_array_equal(x_adv, np.where(inside[:, None], free, np.float32(x)))


@every_attack
def test_gradients_at_any_scale_and_shift(name):
    """Traps 2 and 3. The sigma-zero and FMN margins scale; DDN's cross-entropy does not, so it raises the margin."""
    x, y, weights, bias = scene(True)
    expected = run(name, x, y, logits_of(weights, bias), loss=jn.losses.margin)
    for scale in (2.0**-66, 2.0**66):
        scaled = run(name, x, y, logits_of(weights, bias, scale), loss=jn.losses.margin)
        if name == "sigma_zero":
            # Its two terms are weighed against each other: the scale matters, but neither overflows nor is lost.
            assert (leads(weights, bias, scaled, 1 - y) > -1e-5).all()
        else:
            np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-4)


@every_attack
def test_rows_do_not_depend_on_the_batch(name):
    """Traps 3 and 9."""
    x, y, weights, bias = scene(True)
    keys = jax.random.split(KEY, ROWS)
    whole = run(name, x, y, logits_of(weights, bias), key=keys)
    for rows in (slice(1), slice(5, 8)):
        part = run(name, x[rows], y[rows], logits_of(weights, bias), key=keys[rows])
        np.testing.assert_allclose(part, whole[rows], rtol=0, atol=1e-5)


@every_attack
@pytest.mark.parametrize("what", ["constant", "nan", "infinite"])
def test_models_without_gradients_give_the_clean_row(name, what):
    """Traps 2 and 4. Logits that are no numbers are no success, and no part of the result."""
    x, _, weights, bias = scene(True)
    weights, bias = {
        "constant": (0 * weights, 0 * bias),
        "nan": (weights, np.nan * bias),
        "infinite": (weights * np.inf, bias),
    }[what]
    zero = np.zeros(ROWS, int)
    np.testing.assert_array_equal(run(name, x, zero, logits_of(weights, bias)), np.float32(x))


def cliff(weights, bias, x):
    """A linear model whose logits are no numbers where its class 0 leads: the first of them passes for the largest."""
    logits = x @ weights + bias
    return jnp.where(logits[:, :1] > logits[:, 1:], jnp.nan, logits)


@every_attack
def test_logits_that_are_no_numbers_are_no_success(name):
    x, y, weights, bias = scene(True)
    model = Partial(cliff, jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32))
    x_adv = run(name, x[y == 1], y[y == 1], model)
    np.testing.assert_array_equal(x_adv, np.float32(x[y == 1]))


def step_in(x):
    """Flat everywhere: class 1 where the Euclidean distance from the middle exceeds 1."""
    far = jnp.linalg.norm(x - 0.5, axis=1) > 1
    return jnp.stack([jnp.full(len(x), 0.5), far.astype(x.dtype)], axis=1)


@pytest.mark.parametrize("name", ["ddn", "fmn-Linf", "fmn-L2"])
def test_a_row_without_a_gradient_goes_somewhere(name):
    x = np.full((ROWS, N), 0.5)
    x_adv = run(name, x, np.zeros(ROWS, int), step_in)
    assert (np.linalg.norm(np.asarray(x_adv) - 0.5, axis=1) > 1 - 1e-6).all()  # they end where rounding decides
    assert np.abs(np.asarray(x_adv)[0] - np.asarray(x_adv)[1]).max() > 0.1
    other = run(name, x, np.zeros(ROWS, int), step_in, key=jax.random.key(1))
    assert np.abs(np.asarray(x_adv) - np.asarray(other)).max() > 0.1


@every_attack
def test_settings_are_in_units_of_the_box(name):
    """Data in [-1, 3] gives the same result as in [0, 1], four times as large."""
    x, y, weights, bias = scene(True)
    expected = run(name, x, y, logits_of(weights, bias))
    moved = jnp.asarray(4 * x - 1, jnp.float32)
    x_adv = run(name, moved, y, logits_of(weights / 4, bias + weights.sum(axis=0) / 4), lower=-1.0, upper=3.0)
    if order_of(name) == 0:
        counts = [(np.asarray(a != b)).sum(axis=1) for a, b in ((x_adv, moved), (expected, np.float32(x)))]
        assert np.abs(counts[0] - counts[1]).max() <= 1
    else:
        size = references.norm(order_of(name), np.asarray(x_adv - moved))
        np.testing.assert_allclose(size, 4 * sizes(name, expected, x), rtol=0.02)


@every_attack
def test_images_under_jit_in_double_precision(name, x64):
    attack, cls = ATTACKS[name]
    x, y, weights, bias = scene(True)
    logits_fn = Partial(lambda w, b, x: linear(w, b, x.reshape(len(x), -1)), jnp.asarray(weights), jnp.asarray(bias))
    images = jnp.asarray(x.reshape(ROWS, 5, 3, 2))
    call = partial(attack, threat=cls(jnp.inf))
    x_adv = jax.jit(call)(KEY, logits_fn, images, jnp.asarray(y))
    assert x_adv.dtype == jnp.float64
    assert x_adv.shape == images.shape
    references.assert_inside(cls(np.inf), x_adv, images)
    np.testing.assert_allclose(x_adv, call(KEY, logits_fn, images, jnp.asarray(y)), rtol=0, atol=1e-9)


@every_attack
def test_new_numbers_and_parameters_mean_no_new_trace(name):
    traces = []

    def counted(weights, x):
        traces.append(0)
        return x @ weights

    attack, cls = ATTACKS[name]
    x, y, weights, _ = scene(True)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)
    attack(KEY, Partial(counted, jnp.asarray(weights)), x, y, threat=cls(3.0), step_size=1.0)
    first = len(traces)
    attack(jax.random.key(5), Partial(counted, jnp.asarray(-weights)), 1 - x, y, threat=cls(1.5), step_size=0.5)
    assert 0 < first == len(traces) <= 4


@every_attack
def test_stochastic_models_draw(name):
    """Every look draws anew, and the smallest of all lucky draws is kept: the boundary is met but for the noise."""
    x, y, weights, bias = scene(False)
    shaky = Stochastic(lambda key, x: linear(weights, bias, x + 1e-3 * jax.random.normal(key, x.shape)), KEY, samples=2)
    x_adv, other = (run(name, x, y, shaky, key=jax.random.key(seed)) for seed in (0, 1))
    assert (leads(weights, bias, x_adv, 1 - y) > -5e-3 * np.linalg.norm(weights[:, 1] - weights[:, 0])).all()
    if order_of(name) != 0:
        assert np.abs(np.asarray(x_adv - other)).max() > 0


@every_attack
def test_bad_arguments_raise(name):
    attack, cls = ATTACKS[name]
    x, y = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    short = name.split("-")[0]
    with pytest.raises(ValueError, match=f"{short} takes at least one step, got steps=0"):
        attack(KEY, lambda x: x, x, y, threat=cls(1.0), steps=0)
    with pytest.raises(ValueError, match=f"{short} needs a finite box, got "):
        attack(KEY, lambda x: x, x, y, threat=cls(1.0, lower=-jnp.inf))
    with pytest.raises(ValueError, match="step_size must be a scalar or have one entry for each of the 2 rows"):
        attack(KEY, lambda x: x, x, y, threat=cls(1.0), step_size=jnp.ones(3))
    if short != "fmn":
        with pytest.raises(ValueError, match=f"{short} supports L. alone, got Linf"):
            attack(KEY, lambda x: x, x, y, threat=jn.Linf(1.0))
    else:
        with pytest.raises(ValueError, match="fmn supports Linf, L2, L1 and L0"):
            attack(KEY, lambda x: x, x, y, threat=object())


def test_steps_of_unit_length():
    x, other = jnp.array([[0.0, 0.5], [0.5, 0.5]]), jnp.ones((2, 2))
    gradient = jnp.array([[-3.0, 4.0], [0.0, 0.0]])
    step = unit_step(gradient, other, jn.L2(0.0), x)
    np.testing.assert_allclose(step, [[0, 1], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    free = unit_step(gradient, other, jn.L2(0.0, -jnp.inf, jnp.inf), x)
    np.testing.assert_allclose(free[0], [-0.6, 0.8], rtol=1e-6)
