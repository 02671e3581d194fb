"""Step rules, traced against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.parts import rules

KEY = jax.random.key(0)
NET = references.TanhMLP(seed=0, inputs=5, hidden=7, classes=3)


def tanh_logits(w1, b1, w2, b2, x):
    return jnp.tanh(x @ w1 + b1) @ w2 + b2


def rows(count=6):
    random = np.random.default_rng(1)
    return random.uniform(size=(count, 5)), random.integers(0, 3, count)


def best(candidates, y):
    rank = lambda z: (NET.logits(z).argmax() != y, references.cross_entropy(NET.logits(z), y))  # noqa: E731
    return max(candidates, key=rank)


def momentum_by_hand(order, x, y, *, epsilon, steps, length, decay, ahead):
    """The result of MI-FGSM (``ahead=0``) or NI-FGSM: an iterate that lies its gradient was taken, or the last."""
    x_t, m, candidates = x, np.zeros_like(x), []
    for _ in range(steps):
        place = x_t + ahead * length * decay * m
        gradient = NET.cross_entropy_gradient(place, y)
        m = decay * m + gradient / np.abs(gradient).sum()
        if np.array_equal(place, x_t):
            candidates.append(x_t)
        moved = x_t + length * references.direction(order, m, x_t, 0, 1)
        x_t = references.project(order, moved, x, epsilon, 0, 1)
    return best([*candidates, x_t], y)


@pytest.mark.parametrize(("cls", "ahead"), [(jn.Linf, 5), (jn.L2, 5**0.5)], ids=["Linf", "L2"])
@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_step_by_step(cls, ahead, name, x64):
    """Sums ``g / |g|_1``, direction after; Nesterov's point ahead is as far as the direction of a flat sum is long."""
    x, y = rows()
    logits_fn, differs = Partial(tanh_logits, *map(jnp.asarray, NET.arrays())), 0
    settings = {"epsilon": 0.5, "length": 0.15, "decay": 0.8, "ahead": ahead * (name == "nesterov")}
    attack = partial(jn.attacks.pgd, threat=cls(0.5), step_size=0.15, start=jn.attacks.at_clean)
    for steps in (2, 5):
        result = attack(KEY, logits_fn, jnp.asarray(x), jnp.asarray(y), steps=steps, rule=getattr(rules, name)(0.8))
        for row in range(len(x)):
            order = references.ORDERS[cls.__name__]
            expected = momentum_by_hand(order, x[row], y[row], steps=steps, **settings)
            np.testing.assert_allclose(result[row], expected, rtol=0, atol=1e-8)
            plain = momentum_by_hand(order, x[row], y[row], steps=steps, **(settings | {"decay": 0.0}))
            differs += np.abs(plain - expected).max() > 1e-3
    assert differs, "momentum made no difference"


def test_the_sign_is_taken_of_the_sum():
    """Of gradients 3 and -1 times (1, 0.1), by size: summing signs would give zero, summing raw gradients the same."""
    rule, threat, x = rules.momentum(1.0), jn.Linf(9.0, -9.0, 9.0), jnp.zeros(2)
    z, state = rule.step(rule.init(x), threat, 1.0, jnp.array([3.0, 1.0]), x)
    np.testing.assert_allclose(state, [0.75, 0.25])
    z, state = rule.step(state, threat, 1.0, jnp.array([-200.0, -200.0]), z)
    np.testing.assert_allclose(state, [0.25, -0.25])
    np.testing.assert_allclose(z, [2.0, 0.0])


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_of_zero_tiny_and_huge_gradients(name):
    rule, threat, x = getattr(rules, name)(), jn.Linf(0.3), jnp.full(4, 0.5)
    z, state = rule.step(rule.init(x), threat, 0.1, jnp.zeros(4), x)
    np.testing.assert_array_equal(z, x)
    np.testing.assert_array_equal(state, 0)
    gradient = jnp.array([3.0, -2.0, 0.5, 0.0])
    _, expected = rule.step(state, threat, 0.1, gradient, x)
    for scale in (1e-36, 1e37):
        np.testing.assert_allclose(rule.step(state, threat, 0.1, gradient * scale, x)[1], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_of_large_images_in_half_precision(name):
    """The size of such a gradient is beyond the largest number of its type."""
    x = jnp.full(70_000, 0.5, jnp.float16)
    rule = getattr(rules, name)()
    z, state = rule.step(rule.init(x), jn.Linf(0.3), 0.125, jnp.ones_like(x), x)
    assert z.dtype == state.dtype == jnp.float16
    np.testing.assert_array_equal(z, 0.625)


def test_smoothed_is_a_convolution_of_each_channel():
    random = np.random.default_rng(0)
    gradient, kernel = random.normal(size=(5, 6, 2)), np.outer([1, 2, 1], [1, 3, 1]) / 20
    padded, expected = np.pad(gradient, ((1, 1), (1, 1), (0, 0))), np.zeros_like(gradient)
    for i in range(3):
        for j in range(3):
            expected += kernel[i, j] * padded[i : i + 5, j : j + 6]
    seen = rules.steepest()._replace(step=Partial(lambda state, threat, length, gradient, x: (gradient, state)))
    rule = rules.smoothed(jnp.asarray(kernel), seen)
    result, _ = jax.jit(rule.step)((), jn.Linf(1.0), 1.0, jnp.asarray(gradient, jnp.float32), jnp.zeros((5, 6, 2)))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_gaussian_kernel():
    kernel = np.asarray(rules.gaussian_kernel(7, 1.5))
    assert abs(kernel.sum() - 1) < 1e-6
    np.testing.assert_allclose(kernel, kernel.T)
    np.testing.assert_allclose(kernel[3, 5] / kernel[3, 3], np.exp(-(2**2) / (2 * 1.5**2)), rtol=1e-5)
    np.testing.assert_allclose(rules.gaussian_kernel(7), rules.gaussian_kernel(7, 3**0.5), atol=1e-7)


def test_bad_kernels_raise():
    with pytest.raises(ValueError, match="odd size of at least 1, got size=4"):
        rules.gaussian_kernel(4)
    with pytest.raises(ValueError, match=r"odd k, got shape \[2, 3\]"):
        rules.smoothed(jnp.ones((2, 3)), rules.steepest())
    rule = rules.smoothed(rules.gaussian_kernel(3), rules.steepest())
    with pytest.raises(ValueError, match="image"):
        jn.attacks.pgd(KEY, lambda x: x, jnp.zeros((2, 3)), jnp.zeros(2, int), threat=jn.Linf(0.1), rule=rule)


def test_adam_step_by_step(x64):
    x, y = rows()
    logits_fn = Partial(tanh_logits, *map(jnp.asarray, NET.arrays()))
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.5), step_size=0.15, start=jn.attacks.at_clean, steps=5)
    result = attack(KEY, logits_fn, jnp.asarray(x), jnp.asarray(y), rule=rules.by_optax(optax.adam(1.0)))
    for row in range(len(x)):
        iterates, m, v = [x[row]], 0.0, 0.0
        for t in range(1, 6):
            gradient = NET.cross_entropy_gradient(iterates[-1], y[row])
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moved = iterates[-1] + 0.15 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            iterates.append(references.project(np.inf, moved, x[row], 0.5, 0, 1))
        np.testing.assert_allclose(result[row], best(iterates, y[row]), rtol=0, atol=1e-7)


def test_an_optimizer_sees_one_row():
    """By the norm of the whole batch the small gradient would be clipped away with the large one."""
    scale = jnp.array([[1e4], [1.0]])
    logits_fn = lambda x: jnp.concatenate([-scale * x, scale * x], axis=1)  # noqa: E731
    rule = rules.by_optax(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    x, y = jnp.full((2, 1), 0.5), jnp.zeros(2, int)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.4), steps=1, step_size=0.2, loss=jn.losses.margin, rule=rule)
    np.testing.assert_allclose(attack(KEY, logits_fn, x, y, start=jn.attacks.at_clean), [[0.7], [0.7]], atol=1e-6)


def test_new_numbers_in_a_rule_mean_no_new_trace():
    traces = []

    def logits(x):
        traces.append(0)
        return x

    x, y, optimizer = jnp.full((2, 3), 0.5), jnp.zeros(2, int), optax.adam(1.0)
    for make in (rules.momentum, rules.nesterov, lambda number: rules.by_optax(optimizer)):
        counts, results = [], []
        for number in (0.5, 0.9):
            attack = partial(jn.attacks.pgd, threat=jn.Linf(0.4), steps=3, step_size=0.1 * number, rule=make(number))
            results.append(attack(KEY, logits, x, y))
            counts.append(len(traces))
        assert counts[0] == counts[1]
        assert jnp.abs(results[0] - results[1]).max() > 1e-3


def test_a_coordinate_without_a_gradient_does_not_stop_the_others():
    logits_fn = lambda x: jnp.stack([jnp.zeros(len(x)), x[:, 0] + 0 * jnp.sqrt(x[:, 1])], axis=1)  # noqa: E731
    x, y = jnp.array([[0.5, 0.0]]), jnp.array([0])
    assert jnp.isnan(jax.grad(lambda x: logits_fn(x).sum())(x)).any()
    for rule in (rules.steepest(), rules.momentum(), rules.by_optax(optax.adam(1.0))):
        result = jn.attacks.pgd(KEY, logits_fn, x, y, threat=jn.Linf(0.2), rule=rule, start=jn.attacks.at_clean)
        np.testing.assert_allclose(result, [[0.7, 0.0]], atol=1e-5)
