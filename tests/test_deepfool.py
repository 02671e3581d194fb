"""DeepFool: against closed forms, its steps in numpy, and constructed cases."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.deepfool import deepfool
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.stochastic import Stochastic

THREATS = {"Linf": jn.Linf, "L2": jn.L2}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
KEY, ROWS, INPUTS, CLASSES, WIDE = jax.random.key(0), 7, 6, 4, (-60.0, 60.0)


def linear(weights, bias, x):
    return x.reshape(len(x), -1) @ weights + bias


def linear_case(seed=0):
    random = np.random.default_rng(seed)
    arrays = [random.normal(size=shape) for shape in ((INPUTS, CLASSES), CLASSES, (ROWS, INPUTS))]
    weights, bias, x = (jnp.asarray(part, jnp.float32) for part in arrays)
    return Partial(linear, weights, bias), x, jnp.argmax(linear(weights, bias, x), axis=1)


def exact(cls, logits_fn, x, y):
    """Distances to the nearest boundary of a linear model without a box."""
    (weights, bias), x = (np.asarray(part, np.float64) for part in logits_fn.args), np.asarray(x, np.float64)
    order, sizes = references.dual(references.ORDERS[cls.__name__]), []
    for row, own in zip(x, np.asarray(y), strict=True):
        normals, offsets = weights - weights[:, [own]], bias - bias[own]
        sizes.append(
            min(abs(row @ normals[:, k] + offsets[k]) / np.linalg.norm(normals[:, k], order)
                for k in range(CLASSES) if k != own)
        )  # fmt: skip
    return np.array(sizes)


def size(cls, x_adv, x):
    return references.norm(references.ORDERS[cls.__name__], np.asarray(x_adv, np.float64) - np.asarray(x, np.float64))


@cache
def compiled(cls, rows):
    def attack(epsilon, key, logits_fn, x, y):
        return deepfool(key, logits_fn, x, y, threat=cls(epsilon, *WIDE), steps=20)

    attack.__name__ = f"deepfool_{cls.__name__}_{rows}"
    return jax.jit(chex.assert_max_traces(attack, n=1))


def run(cls, logits_fn, x, y, epsilon=np.inf):
    return compiled(cls, len(x))(jnp.float32(epsilon), row_keys(KEY, len(x)), logits_fn, x, y)


@every_threat
def test_nearest_boundary_of_a_linear_model(cls):
    for seed in range(3):
        logits_fn, x, y = linear_case(seed)
        x_adv = run(cls, logits_fn, x, y)
        assert (jnp.argmax(logits_fn(x_adv), axis=1) != y).all()
        nearest, found = exact(cls, logits_fn, x, y), size(cls, x_adv, x)
        np.testing.assert_allclose(found, 1.02 * nearest, rtol=1e-3)
        epsilon = float(np.median(found))
        limited = run(cls, logits_fn, x, y, epsilon=epsilon)
        beyond = found > epsilon * (1 + 1e-6)
        np.testing.assert_array_equal(limited[beyond], x[beyond])
        np.testing.assert_array_equal(limited[found < epsilon], x_adv[found < epsilon])
        assert 0 < beyond.sum() < ROWS


@every_threat
def test_box_that_binds(cls):
    """The first coordinate counts most and has no room, so the second does the work."""
    x = jnp.array([[1.0, 0.5, 0.5], [0.9, 0.5, 0.5]])
    weights = jnp.array([[0.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    logits_fn = Partial(linear, weights, jnp.array([0.0, -5.5]))
    y = jnp.array([0, 0])
    # Gaps: 5.5 - 4 - 1 = 0.5 with slope 2 alone, and 5.5 - 3.6 - 1 = 0.9 of which the first coordinate closes 0.4.
    best = {"Linf": [0.25, 0.25], "L2": [0.25, np.hypot(0.1, 0.25)]}[cls.__name__]
    x_adv = deepfool(KEY, logits_fn, x, y, threat=cls(np.inf))
    references.assert_inside(cls(np.inf), x_adv, x)
    assert (jnp.argmax(logits_fn(x_adv), axis=1) == 1).all()
    found = size(cls, x_adv, x)
    assert (found >= np.array(best) * (1 - 1e-5)).all()
    assert (found <= np.array(best) * 1.05).all()


def test_no_boundary_in_the_box_gives_x():
    logits_fn = Partial(linear, jnp.array([[0.0, 1.0]] * 3), jnp.array([9.0, 0.0]))
    x = jnp.full((2, 3), 0.5)
    np.testing.assert_array_equal(deepfool(KEY, logits_fn, x, jnp.array([0, 0]), threat=jn.L2(np.inf)), x)


@pytest.mark.parametrize("order", ["L2", "Linf"])
def test_steps_against_numpy(order, x64):
    net = references.TanhMLP(seed=2, inputs=5, hidden=7, classes=3)
    x = np.random.default_rng(1).normal(size=(6, 5))
    y = np.array([net.logits(row).argmax() for row in x])

    def logits(w1, b1, w2, b2, x):
        return jnp.tanh(x @ w1 + b1) @ w2 + b2

    def by_hand(x, y):
        x_t = x
        for number in range(31):
            if (z := net.logits(x_t)).argmax() != y:
                return x_t, number
            slopes = 1 - np.tanh(x_t @ net.w1 + net.b1) ** 2
            planes = [(z[k] - z[y], net.w1 @ ((net.w2[:, k] - net.w2[:, y]) * slopes)) for k in range(3) if k != y]
            q = {"L2": 2, "Linf": 1}[order]
            value, normal = min(planes, key=lambda plane: abs(plane[0]) / np.linalg.norm(plane[1], q))
            step = normal / np.linalg.norm(normal) if q == 2 else np.sign(normal)
            length = 1.02 * abs(value) / np.linalg.norm(normal, q)
            x_t = x_t + max(length, 0.02 * np.linalg.norm(x_t - x, references.ORDERS[order])) * step
        return x, number

    logits_fn = Partial(logits, *map(jnp.asarray, net.arrays()))
    x_adv = deepfool(KEY, logits_fn, jnp.asarray(x), jnp.asarray(y), threat=THREATS[order](np.inf, *WIDE), steps=30)
    expected, rounds = zip(*map(by_hand, x, y), strict=True)
    found = [row for row, number in enumerate(rounds) if number < 30 and np.abs(expected[row]).max() < 50]
    assert len(found) >= 4
    assert max(rounds[row] for row in found) >= 2
    np.testing.assert_allclose(np.asarray(x_adv)[found], np.stack(expected)[found], rtol=0, atol=1e-8)


def test_a_row_that_is_wrong_already_is_returned():
    logits_fn, x, y = linear_case()
    wrong = np.arange(ROWS) % 2 == 0
    x_adv = run(jn.L2, logits_fn, x, jnp.where(wrong, (y + 1) % CLASSES, y))
    np.testing.assert_array_equal(x_adv[wrong], x[wrong])
    assert (size(jn.L2, x_adv, x)[~wrong] > 0).all()


@every_threat
def test_targeted_goal_reaches_the_wanted_class(cls):
    logits_fn, x, y = linear_case()
    attack = partial(deepfool, threat=cls(np.inf, *WIDE), loss=jn.losses.targeted(jn.losses.margin))
    x_adv = attack(KEY, logits_fn, x, (y + 1) % CLASSES)
    assert (jnp.argmax(logits_fn(x_adv), axis=1) == (y + 1) % CLASSES).all()
    np.testing.assert_array_equal(attack(KEY, logits_fn, x, y), x)


def test_classes_limit_the_boundaries():
    """The likeliest other class has the furthest boundary."""
    logits_fn = Partial(linear, jnp.array([[0.0, 0.1, 4.0]]), jnp.array([0.0, -0.1, -2.0]))
    x, y = jnp.zeros((1, 1)), jnp.array([0])
    attack = partial(deepfool, KEY, logits_fn, x, y, threat=jn.L2(np.inf, *WIDE), steps=1)
    np.testing.assert_allclose(attack(), [[0.51]], atol=1e-5)
    assert jnp.argmax(logits_fn(attack(classes=1))) != 0
    assert abs(attack(classes=1)[0, 0] - 1.02) < 1e-5


@every_threat
def test_scale_of_the_logits_does_not_matter(cls):
    logits_fn, x, y = linear_case()
    expected = run(cls, logits_fn, x, y)
    for scale in (1e-20, 1e20):
        scaled = jax.tree.map(lambda leaf, by=scale: leaf * by, logits_fn)
        np.testing.assert_allclose(run(cls, scaled, x, y), expected, rtol=0, atol=1e-4)


@every_threat
def test_trouble_leaves_x(cls):
    logits_fn, x, y = linear_case()
    np.testing.assert_array_equal(run(cls, logits_fn, x, y, epsilon=0.0), x)
    for value in (0.0, np.nan):
        broken = jax.tree.map(lambda leaf, by=value: leaf * by, logits_fn)
        np.testing.assert_array_equal(run(cls, broken, x, jnp.zeros(ROWS, int)), x)


def test_rows_do_not_depend_on_the_batch_or_their_place():
    logits_fn, x, y = linear_case()
    whole = run(jn.L2, logits_fn, x, y)
    np.testing.assert_allclose(run(jn.L2, logits_fn, x[:1], y[:1]), whole[:1], atol=1e-5)
    np.testing.assert_allclose(run(jn.L2, logits_fn, x[::-1], y[::-1]), whole[::-1], atol=1e-5)
    image = deepfool(KEY, logits_fn, x.reshape(ROWS, 2, 3, 1), y, threat=jn.L2(np.inf, *WIDE), steps=20)
    np.testing.assert_allclose(image.reshape(ROWS, -1), whole, atol=1e-5)


def test_other_types(x64):
    logits_fn, x, y = linear_case()
    for dtype in (jnp.bfloat16, jnp.float64):
        x_adv = deepfool(KEY, logits_fn, x.astype(dtype), y, threat=jn.L2(jnp.float32(np.inf), *WIDE))
        assert x_adv.dtype == dtype
        assert np.isfinite(np.asarray(x_adv, np.float64)).all()


def test_a_model_that_draws():
    logits_fn, x, y = linear_case()
    noisy = Stochastic(lambda key, x: logits_fn(x + 0.01 * jax.random.normal(key, x.shape)), KEY, samples=2)
    x_adv = deepfool(KEY, noisy, x, y, threat=jn.L2(np.inf, *WIDE))
    assert (size(jn.L2, x_adv, x) < exact(jn.L2, logits_fn, x, y) + 0.3).all()


def test_bad_arguments_raise():
    logits_fn, x, y = linear_case()
    with pytest.raises(ValueError, match="at least one step, got steps=0"):
        deepfool(KEY, logits_fn, x, y, threat=jn.L2(1.0), steps=0)
    with pytest.raises(ValueError, match="another class: got classes=0"):
        deepfool(KEY, logits_fn, x, y, threat=jn.L2(1.0), classes=0)
    with pytest.raises(ValueError, match="integer classes"):
        deepfool(KEY, logits_fn, x, x, threat=jn.L2(1.0))
    with pytest.raises(ValueError, match="Linf or L2 threat, got L1"):
        deepfool(KEY, logits_fn, x, y, threat=jn.L1(1.0))
