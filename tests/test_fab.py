"""FAB and FAB-T: against the nearest boundaries of linear models, the paper's steps in numpy, and constructed cases."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial
from scipy.optimize import linprog, minimize

import jaxnets as jn
from jaxnets.attacks.fab import fab, fab_targeted, halfway
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.stochastic import Stochastic

THREATS = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
ATTACKS = {"fab": partial(fab, steps=30), "fab_targeted": partial(fab_targeted, steps=30)}
every_attack = pytest.mark.parametrize("name", ATTACKS)
KEY, ROWS, INPUTS, CLASSES = jax.random.key(0), 7, 6, 4


def linear(weights, bias, x):
    return x.reshape(len(x), -1) @ weights + bias


def linear_case(seed=0):
    """A linear model, rows of a box [-1, 2] many of whose coordinates lie on its faces, and their classes."""
    random = np.random.default_rng(seed)
    weights, bias = random.normal(size=(INPUTS, CLASSES)), random.normal(size=CLASSES)
    x = np.clip(random.uniform(-1.8, 2.8, (ROWS, INPUTS)), -1, 2)
    arrays = [jnp.asarray(part, jnp.float32) for part in (weights, bias, x)]
    return Partial(linear, *arrays[:2]), arrays[2], jnp.argmax(linear(*arrays), axis=1)


def nearest_boundary(order, weights, bias, x, y):
    """The size of the smallest perturbation inside the box that makes another class at least as likely, by solvers."""
    return min(_least(order, weights[:, k] - weights[:, y], bias[k] - bias[y], x) for k in range(CLASSES) if k != y)


def _least(order, normal, offset, x):
    gap, n = -(normal @ x + offset), len(x)
    up, down = 2 - x, x + 1
    if np.where(normal > 0, up, down) @ np.abs(normal) < gap:
        return np.inf
    if order == 2:
        equal = {"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal}
        bounds = list(zip(-down, up, strict=True))
        found = minimize(lambda d: d @ d / 2, np.zeros(n), jac=lambda d: d, bounds=bounds, constraints=equal)
        return np.linalg.norm(found.x)
    bounds, plane = [(0, room) for room in np.concatenate([up, down])], np.concatenate([normal, -normal])
    if order == 1:
        return linprog(np.ones(2 * n), A_eq=plane[None], b_eq=[gap], bounds=bounds).fun
    below, cost = np.hstack([np.eye(2 * n), -np.ones((2 * n, 1))]), np.append(np.zeros(2 * n), 1)
    bounds = [*bounds, (0, None)]
    return linprog(
        cost, A_ub=below, b_ub=np.zeros(2 * n), A_eq=np.append(plane, 0)[None], b_eq=[gap], bounds=bounds
    ).fun


@cache
def compiled(name, cls, rows=ROWS, dtype="float32"):
    def attack(epsilon, key, logits_fn, x, y):
        return ATTACKS[name](key, logits_fn, x, y, threat=cls(epsilon, -1.0, 2.0))

    attack.__name__ = f"{name}_{cls.__name__}_{rows}_{dtype}"
    return jax.jit(chex.assert_max_traces(attack, n=1))


def run(name, cls, logits_fn, x, y, epsilon=np.inf, key=None):
    key = row_keys(KEY, len(x)) if key is None else key
    return compiled(name, cls, len(x), str(x.dtype))(jnp.asarray(epsilon, x.dtype), key, logits_fn, x, y)


def size(cls, x_adv, x):
    return references.norm(references.ORDERS[cls.__name__], np.asarray(x_adv, np.float64) - np.asarray(x, np.float64))


@every_attack
@every_threat
def test_nearest_boundary_of_a_linear_model_within_the_box(name, cls):
    for seed in range(3):
        logits_fn, x, y = linear_case(seed)
        weights, bias = (np.asarray(part, np.float64) for part in logits_fn.args)
        exact = [nearest_boundary(references.ORDERS[cls.__name__], weights, bias, *row)
                 for row in zip(np.asarray(x, np.float64), np.asarray(y), strict=True)]  # fmt: skip
        x_adv = run(name, cls, logits_fn, x, y)
        references.assert_inside(cls(np.inf, -1.0, 2.0), x_adv, x)
        assert (jnp.argmax(logits_fn(x_adv), axis=1) != y).all()
        found = size(cls, x_adv, x)
        assert (found >= np.array(exact) * (1 - 1e-5)).all()
        assert (found <= np.array(exact) * 1.05).all() if name == "fab_targeted" else np.median(found / exact) <= 1.05
        # What lies beyond epsilon does not count, and what lies within does.
        epsilon = float(np.median(found))
        limited = run(name, cls, logits_fn, x, y, epsilon=epsilon)
        beyond = found > epsilon * (1 + 1e-6)
        assert beyond.any()
        np.testing.assert_array_equal(limited[beyond], x[beyond])
        np.testing.assert_array_equal(limited[found < epsilon], x_adv[found < epsilon])
        references.assert_inside(cls(epsilon, -1.0, 2.0), limited, x)


@every_attack
def test_a_row_that_is_wrong_already_is_returned(name):
    logits_fn, x, y = linear_case()
    wrong = jnp.arange(ROWS) % 2 == 0
    x_adv = run(name, jn.L2, logits_fn, x, jnp.where(wrong, (y + 1) % CLASSES, y))
    np.testing.assert_array_equal(x_adv[wrong], x[wrong])
    assert (size(jn.L2, x_adv, x)[~wrong] > 0).all()


@every_threat
def test_targeted_goal_reaches_the_wanted_class(cls):
    logits_fn, x, y = linear_case()
    wanted = (y + 1) % CLASSES
    attack = partial(fab, threat=cls(jnp.inf, -9.0, 9.0), steps=40, loss=jn.losses.targeted(jn.losses.margin))
    x_adv = attack(KEY, logits_fn, x, wanted)
    assert (jn.losses.margin(logits_fn(x_adv), wanted) < 1e-6).all()  # they end where rounding decides
    np.testing.assert_array_equal(attack(KEY, logits_fn, x, y), x)


# The rule, step by step.


class Net(references.TanhMLP):
    def differences(self, x, y, k):
        hidden = np.tanh(x @ self.w1 + self.b1)
        column = self.w2[:, k] - self.w2[:, y]
        return self.logits(x)[k] - self.logits(x)[y], self.w1 @ (column * (1 - hidden**2))


def l2_step(z, normal, gap):
    """By bisection: ``min(t |w|, room)``."""
    room = np.where(normal * gap > 0, 1 - z, z)
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.minimum(t * np.abs(normal), room) @ np.abs(normal) < abs(gap) else (low, t)
    return np.sign(normal * gap) * np.minimum(high * np.abs(normal), room)


def fab_by_hand(net, x, y, steps, alpha_max=0.1, eta=1.05, beta=0.9):
    x_t, best = x, (np.inf, x)
    for number in range(steps + 1):
        reached = net.logits(x_t).argmax() != y
        if reached:
            best = min(best, (np.linalg.norm(x_t - x), x_t), key=lambda pair: pair[0])
        if number == steps:
            return shortened_by_hand(net, x, y, best[1])
        z = x + beta * (x_t - x) if reached else x_t
        planes = [net.differences(z, y, k) for k in range(3) if k != y]
        value, normal = min(planes, key=lambda plane: abs(plane[0]) / np.linalg.norm(plane[1]))
        d, d_0 = (l2_step(a, normal, -value - normal @ (a - z)) for a in (z, x))
        alpha = min(np.linalg.norm(d) / (np.linalg.norm(d) + np.linalg.norm(d_0)), alpha_max)
        x_t = np.clip((1 - alpha) * (z + eta * d) + alpha * (x + eta * d_0), 0, 1)
    raise AssertionError


def shortened_by_hand(net, x, y, found):
    """The nearest adversarial point of ten halvings between ``x`` and what was found."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        wrong = net.logits(x + middle * (found - x)).argmax() != y
        low, high = (low, middle) if wrong else (middle, high)
    return x + high * (found - x)


def test_iterates_against_numpy(x64):
    net = Net(seed=1, inputs=5, hidden=7, classes=3)
    x = np.random.default_rng(1).uniform(size=(6, 5))
    y = np.array([net.logits(row).argmax() for row in x])

    def logits(w1, b1, w2, b2, x):
        return jnp.tanh(x @ w1 + b1) @ w2 + b2

    logits_fn = Partial(logits, *map(jnp.asarray, net.arrays()))
    for steps in (1, 2, 9):
        x_adv = fab(KEY, logits_fn, jnp.asarray(x), jnp.asarray(y), threat=jn.L2(jnp.inf), steps=steps)
        by_hand = np.stack([fab_by_hand(net, *row, steps) for row in zip(x, y, strict=True)])
        np.testing.assert_allclose(x_adv, by_hand, rtol=0, atol=1e-8)
    assert (np.abs(by_hand - x).max(axis=1) > 1e-3).sum() >= 3


def test_settings_are_used():
    logits_fn, x, y = linear_case()
    attack = partial(fab, KEY, logits_fn, x, y, threat=jn.L2(jnp.inf, -1.0, 2.0), steps=4)
    for other in ({"eta": 1.3}, {"beta": 0.5, "eta": 1.2}, {"alpha_max": 0.9, "eta": 1.01}, {"steps": 1}):
        assert np.abs(np.asarray(attack() - attack(**other))).max() > 1e-4


# Trouble.


@every_attack
@every_threat
def test_scale_of_the_logits_does_not_matter(name, cls):
    logits_fn, x, y = linear_case()
    expected = run(name, cls, logits_fn, x, y)
    for scale in (1e-20, 1e20):
        scaled = jax.tree.map(lambda leaf, by=scale: leaf * by, logits_fn)
        np.testing.assert_allclose(run(name, cls, scaled, x, y), expected, rtol=0, atol=2e-3)


@every_attack
@every_threat
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_models_without_gradients_leave_x(name, cls, value):
    logits_fn, x, _ = linear_case()
    broken = jax.tree.map(lambda leaf: leaf * value, logits_fn)
    np.testing.assert_array_equal(run(name, cls, broken, x, jnp.zeros(ROWS, int)), x)


@every_attack
@every_threat
def test_no_budget_gives_x(name, cls):
    logits_fn, x, y = linear_case()
    np.testing.assert_array_equal(run(name, cls, logits_fn, x, y, epsilon=0.0), x)


@every_attack
def test_rows_do_not_depend_on_the_batch_or_their_place(name):
    logits_fn, x, y = linear_case()
    keys = row_keys(KEY, ROWS)
    whole = run(name, jn.L2, logits_fn, x, y)
    np.testing.assert_allclose(run(name, jn.L2, logits_fn, x[:1], y[:1], key=keys[:1]), whole[:1], atol=1e-4)
    np.testing.assert_allclose(run(name, jn.L2, logits_fn, x[::-1], y[::-1], key=keys[::-1]), whole[::-1], atol=1e-4)


@every_attack
def test_eager_equals_jit_and_images_equal_flat_rows(name):
    logits_fn, x, y = linear_case()
    attack = partial(ATTACKS[name], threat=jn.Linf(np.inf, -1.0, 2.0))
    inside = run(name, jn.Linf, logits_fn, x, y)
    np.testing.assert_allclose(attack(KEY, logits_fn, x, y), inside, atol=1e-4)
    image = attack(KEY, logits_fn, x.reshape(ROWS, 2, 3, 1), y)
    np.testing.assert_allclose(image.reshape(ROWS, -1), inside, atol=1e-4)


@pytest.mark.slow
@every_attack
def test_other_types(name, x64):
    logits_fn, x, y = linear_case()
    for dtype in (jnp.bfloat16, jnp.float64):
        x_adv = ATTACKS[name](KEY, logits_fn, x.astype(dtype), y, threat=jn.L1(jnp.float32(np.inf), -1.0, 2.0))
        assert x_adv.dtype == dtype
        assert np.isfinite(np.asarray(x_adv, np.float64)).all()


@every_attack
def test_a_model_that_draws(name):
    logits_fn, x, y = linear_case()
    noisy = Stochastic(lambda key, x: logits_fn(x + 0.01 * jax.random.normal(key, x.shape)), KEY, samples=2)
    x_adv = ATTACKS[name](KEY, noisy, x, y, threat=jn.L2(np.inf, -1.0, 2.0))
    exact = size(jn.L2, run(name, jn.L2, logits_fn, x, y), x)
    assert (size(jn.L2, x_adv, x) < exact + 0.2).all()


def test_halfway_lies_at_half_of_epsilon():
    x, keys = jnp.full((4, 3, 5), 0.5), row_keys(KEY, 4)
    for cls, epsilon in ((jn.Linf, 0.3), (jn.L2, 0.7), (jn.L1, 1.0)):
        threat = cls(epsilon * jnp.array([0.0, 0.5, 1.0, 1.0]))
        x_0 = halfway(keys, threat, x)
        np.testing.assert_allclose(size(cls, x_0, x), threat.epsilon / 2, atol=1e-6)
        assert np.abs(np.asarray(x_0[2] - x_0[3])).max() > 1e-3
        references.assert_inside(cls(np.inf), halfway(keys, cls(np.inf), x), x)


@pytest.mark.slow
@every_attack
def test_random_starts_find_other_points(name):
    logits_fn, x, y = linear_case()
    attack = partial(ATTACKS[name], threat=jn.L2(2.0, -1.0, 2.0), start=halfway)
    x_adv = jn.attacks.restarts(attack, 2)(KEY, logits_fn, x, y)
    references.assert_inside(jn.L2(2.0, -1.0, 2.0), x_adv, x)
    assert np.abs(np.asarray(attack(KEY, logits_fn, x, y) - attack(jax.random.key(1), logits_fn, x, y))).max() > 1e-6
    wrong = attack(KEY, logits_fn, x, (y + 1) % CLASSES)
    np.testing.assert_array_equal(wrong, x)


def test_two_passes_of_the_model_a_step_and_thirteen_more():
    logits_fn, x, y = linear_case()
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(0))
        return logits_fn(x)

    for attack in (fab, fab_targeted):
        calls.clear()
        attack(KEY, counted, x, y, threat=jn.L2(np.inf, -1.0, 2.0), steps=10).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == 2 * 10 + 13


@every_attack
def test_bad_arguments_raise(name):
    attack, (logits_fn, x, y) = ATTACKS[name], linear_case()
    with pytest.raises(ValueError, match="at least one step, got steps=0"):
        attack(KEY, logits_fn, x, y, threat=jn.L2(1.0), steps=0)
    with pytest.raises(ValueError, match="Linf, L2 or L1 threat, got 'ball'"):
        attack(KEY, logits_fn, x, y, threat="ball")
    with pytest.raises(ValueError, match="integer classes"):
        attack(KEY, logits_fn, x, jnp.zeros((ROWS, CLASSES)), threat=jn.L2(1.0))
    with pytest.raises(ValueError, match="needs another class"):
        attack(KEY, lambda x: x[:, :1], x, y, threat=jn.L2(1.0))
    with pytest.raises(ValueError, match="one entry for each of the 7 rows"):
        attack(KEY, logits_fn, x, y, threat=jn.L2(jnp.ones(3)))
