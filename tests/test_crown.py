"""CROWN-IBP: against numpy, linear programs and attacks; where nothing is unstable it is exact."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_differences import assert_slope
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

import jaxnets as jn
from jaxnets.certificates import box, crown_margins, interval_margins, tightest_margins
from jaxnets.certificates.crown import _planes
from jaxnets.certificates.rules import Interval
from jaxnets.certificates.tape import Step

KEY = jax.random.key(0)


def problem(seed=0, sizes=(5, 7, 6, 4), rows=3, width=0.3, dtype=np.float64):
    """Weights of an MLP, boxes and classes."""
    random = np.random.default_rng(seed)
    weights = [
        ((random.normal(size=size) / size[0] ** 0.5).astype(dtype), (random.normal(size=size[1]) / 5).astype(dtype))
        for size in pairwise(sizes)
    ]
    x = random.normal(size=(rows, sizes[0]))
    ends = [(x + sign * random.uniform(0, width, x.shape)).astype(dtype) for sign in (-1, 1)]
    return weights, *ends, random.integers(0, sizes[-1], rows)


def mlp(weights, x, relu=jax.nn.relu):
    for kernel, bias in weights[:-1]:
        x = relu(x @ kernel + bias)
    return x @ weights[-1][0] + weights[-1][1]


def before_relu(weights, lower, upper):
    """Interval bounds before each ReLU, of one row."""
    found = []
    for kernel, bias in weights[:-1]:
        middle, radius = (lower + upper) / 2 @ kernel + bias, (upper - lower) / 2 @ np.abs(kernel)
        found.append((middle - radius, middle + radius))
        lower, upper = (np.maximum(end, 0) for end in found[-1])
    return found


def crown_by_hand(weights, lower, upper, y):
    """Zhang et al.'s equations for one row, with explicit matrices and intercepts: ``A x + b``."""
    kernel, bias = weights[-1]
    differences = np.eye(len(bias))[y] - np.eye(len(bias))
    A, b = differences @ kernel.T, differences @ bias
    for (kernel, bias), (low, high) in zip(weights[-2::-1], before_relu(weights, lower, upper)[::-1], strict=True):
        beneath, above, intercept = np.zeros_like(low), np.zeros_like(low), np.zeros_like(low)
        for unit, (least, most) in enumerate(zip(low, high, strict=True)):
            if least >= 0:
                beneath[unit] = above[unit] = 1
            elif most > 0:
                beneath[unit] = float(most > -least)
                above[unit] = most / (most - least)
                intercept[unit] = -above[unit] * least
        b = b + np.minimum(A, 0) @ intercept
        A = np.maximum(A, 0) * beneath + np.minimum(A, 0) * above
        A, b = A @ kernel.T, b + A @ bias
    return np.maximum(A, 0) @ lower + np.minimum(A, 0) @ upper + b


@pytest.mark.parametrize("sizes", [(5, 4), (5, 7, 4), (5, 7, 6, 8, 3)])
def test_an_mlp_against_numpy(sizes, x64):
    weights, lower, upper, y = problem(sizes=sizes)
    found = crown_margins(partial(mlp, weights), *map(jnp.asarray, (lower, upper, y)))
    expected = [crown_by_hand(weights, *row) for row in zip(lower, upper, y, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    assert (np.asarray(found)[range(3), y] == 0).all()


def best_by_linear_program(weights, lower, upper, y):
    """The least margins over ReLU's convex hulls: for one hidden layer no linear bounds are tighter."""
    (kernel, bias), (last, shift) = weights
    [(low, high)] = before_relu(weights, lower, upper)
    inputs, units = kernel.shape
    slope = np.where(low >= 0, 1, np.where(high <= 0, 0, high / (high - low)))
    # z >= W x + b, z >= 0 and z <= slope (W x + b - low), or + 0 where the unit is stable.
    below = np.hstack([kernel.T, -np.eye(units)])
    above = np.hstack([-(kernel * slope).T, np.eye(units)])
    open_ = (low < 0) & (high > 0)
    constant = slope * np.where(open_, bias - low, bias)
    bounds = [*zip(lower, upper, strict=True), *[(0, None)] * units]
    least = []
    for other in range(last.shape[1]):
        cost = np.concatenate([np.zeros(inputs), last[:, y] - last[:, other]])
        ends = np.concatenate([-bias, constant])
        least.append(linprog(cost, np.vstack([below, above]), ends, bounds=bounds).fun + shift[y] - shift[other])
    return np.array(least)


@pytest.mark.parametrize("seed", range(5))
def test_never_above_the_best_linear_bounds_nor_those_above_the_truth(seed, x64):
    weights, lower, upper, y = problem(seed, sizes=(4, 6, 3), rows=1, width=0.8)
    row = lower[0], upper[0], y[0]
    arguments = (partial(mlp, weights), *map(jnp.asarray, (lower, upper, y)))
    best = best_by_linear_program(weights, *row)
    for margins in (crown_margins, interval_margins):
        assert (np.asarray(margins(*arguments))[0] <= best + 1e-8).all()
    points = row[0] + np.random.default_rng(seed).uniform(size=(5000, 4)).round(1) * (row[1] - row[0])
    logits = np.asarray(mlp(weights, points))
    assert (best <= (logits[:, [row[2]]] - logits).min(0) + 1e-8).all()


def test_exact_where_every_unit_is_stable(x64):
    weights, lower, upper, y = problem(width=1e-4)
    found = crown_margins(partial(mlp, weights), *map(jnp.asarray, (lower, upper, y)))
    corners = np.stack(np.meshgrid(*[[0, 1]] * 5), -1).reshape(-1, 1, 5)
    logits = np.asarray(mlp(weights, lower + corners * (upper - lower)))
    exact = (logits[:, range(3), y][..., None] - logits).min(0)
    np.testing.assert_allclose(found, exact, atol=1e-12)
    assert all((low * high > 0).all() for row in range(3) for low, high in before_relu(weights, lower[row], upper[row]))


def test_tighter_than_intervals_on_an_untrained_network():
    weights, lower, upper, y = problem(sizes=(5, 20, 20, 4), dtype=np.float32)
    arguments = (partial(mlp, weights), *map(jnp.asarray, (lower, upper, y)))
    assert np.mean(crown_margins(*arguments)) > np.mean(interval_margins(*arguments)) + 0.05


# Maxima.


@given(ends=st.lists(st.floats(-2, 2), min_size=4, max_size=4), sign=st.sampled_from([-1.5, 2.0]))
def test_planes_hold_and_touch(ends, sign):
    (la, ua), (lb, ub) = np.sort(ends[:2]), np.sort(ends[2:])
    a, b = Interval(np.array([la]), np.array([ua])), Interval(np.array([lb]), np.array([ub]))
    result = Interval(np.maximum(a.lower, b.lower), np.maximum(a.upper, b.upper))
    shares, bias = _planes(Step(np.maximum, [a, b], [result], False, (a, b)), np.array([[sign]]))
    coefficients = {operand: float(share[0, 0]) for operand, share in shares}
    at_a, at_b = np.meshgrid(np.linspace(la, ua, 21), np.linspace(lb, ub, 21))
    plane = coefficients[a] * (at_a - a.center) + coefficients[b] * (at_b - b.center) + float(bias[0])
    room = sign * (np.maximum(at_a, at_b) - result.center) - plane
    assert room.min() >= -1e-5
    assert room.min() <= 1e-5


def test_the_relu_of_our_networks_is_known_as_a_maximum(x64):
    weights, lower, upper, y = problem(width=0.5)
    found, expected = (
        crown_margins(lambda x, relu=relu: mlp(weights, x, relu), lower, upper, y)
        for relu in (jn.models.layers.relu, jax.nn.relu)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_max_pooling_is_kept_as_planes():
    """A choice by comparison is known as a maximum: the bounds are those of ReLU on the same maximum."""
    random = np.random.default_rng(0)
    kernel, lower = random.normal(size=(8, 8)).astype(np.float32), random.normal(size=(2, 8)).astype(np.float32)
    pooled = lambda x: jn.models.layers.max_pool((x @ kernel).reshape(-1, 2, 4, 1)).reshape(-1, 2)  # noqa: E731

    def by_relu(x):
        x = (x @ kernel).reshape(-1, 2, 2, 2)
        taps = [x[:, i, :, j] for i in (0, 1) for j in (0, 1)]
        best = taps[0]
        for tap in taps[1:]:
            best = jnp.maximum(tap, best)
        return best

    lower, upper, y = jnp.asarray(lower), jnp.asarray(lower + 0.5), jnp.array([0, 1])
    found, expected = (crown_margins(network, lower, upper, y) for network in (pooled, by_relu))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    intervals = interval_margins(pooled, lower, upper, y)
    assert (found > intervals + 0.1).any()
    assert (found < intervals - 0.1).any()
    np.testing.assert_array_equal(tightest_margins(pooled, lower, upper, y), np.maximum(found, intervals))


def test_other_curves_are_bounded_by_their_intervals(x64):
    weights, lower, upper, y = problem(sizes=(5, 7, 4))
    network = lambda x: jnp.tanh(x @ weights[0][0]) @ weights[1][0]  # noqa: E731
    arguments = (network, *map(jnp.asarray, (lower, upper, y)))
    np.testing.assert_allclose(crown_margins(*arguments), interval_margins(*arguments), rtol=1e-12)


# Networks.

NETWORKS = {
    "overlapping pooling": (
        jn.models.ResNet((1,), jn.models.resnet.BasicBlock, 5, 4, jn.models.imagenet_stem), (12, 12, 3), 0.002
    ),
    "SmallCNN": (jn.models.SmallCNN(), (8, 8, 1), 0.01),
    "MadryCNN": (jn.models.MadryCNN(), (28, 28, 1), 0.005),
    "LeNet5": (jn.models.LeNet5(), (28, 28, 1), 0.005),
    "LeNet5.modern": (jn.models.LeNet5.modern(), (28, 28, 1), 0.005),
    "resnet18": (jn.models.resnet18(10, width=4, stem=jn.models.cifar_stem), (16, 16, 3), 0.001),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_margins_of_networks_under_attack_are_never_below(name):
    module, shape, epsilon = NETWORKS[name]
    net, threat = jn.from_linen(module), jn.Linf(epsilon)
    x = jax.random.uniform(KEY, (2, *shape))
    params, stats = jax.jit(net.init)(KEY, x)
    stats = jax.jit(net.train)(params, stats, x, KEY)[1]
    model, y = net.logits_fn(params, stats), jnp.array([0, 1])
    margins = np.asarray(crown_margins(model, *box(threat, x), y))
    assert np.isfinite(margins).all()
    corner = x + epsilon * jnp.sign(jax.random.normal(KEY, x.shape))
    points = [x, threat.project(corner, x)]
    for label in (y, y + 1):
        attack = partial(jn.attacks.pgd, threat=threat, steps=5, loss=jn.losses.margin)
        points.append(attack(KEY, model, x, label))
    logits = np.asarray(jax.lax.map(model, jnp.stack(points)))
    true = logits[:, [0, 1], y][..., None] - logits
    assert (true >= margins - 1e-5 * np.abs(logits).max()).all()
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(crown_margins(net.logits_fn(p, stats), *box(threat, x), y))))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gradients_against_finite_differences(x64):
    weights, lower, upper, y = problem()

    @jax.jit
    def value(weights):
        return jnp.sum(
            jnp.cos(crown_margins(jax.tree_util.Partial(mlp, weights), *map(jnp.asarray, (lower, upper, y))))
        )

    gradient, random = jax.jit(jax.grad(value))(weights), np.random.default_rng(5)
    for _ in range(5):
        assert_slope(value, gradient, weights, random, rtol=1e-6)
