"""Interval bounds: against numpy, PyTorch and corners of boxes; every operation and network holds what it bounds."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from finite_differences import assert_slope
from hypothesis import given
from hypothesis import strategies as st

import jaxnets as jn
from jaxnets.certificates import box, crown_margins, interval_bounds, interval_margins
from jaxnets.models import layers

KEY = jax.random.key(0)


def dense_layers(seed=0, sizes=(5, 7, 6, 4)):
    random = np.random.default_rng(seed)
    return [(random.normal(size=size) / size[0] ** 0.5, random.normal(size=size[1]) / 5) for size in pairwise(sizes)]


def mlp(weights, x):
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ weights[-1][0] + weights[-1][1]


def boxes(seed=0, rows=3, inputs=5, width=0.3):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, inputs))
    return x - random.uniform(0, width, x.shape), x + random.uniform(0, width, x.shape)


def as_array(*arrays):
    return tuple(map(jnp.asarray, arrays))


def points_inside(lower, upper, count=200, seed=0):
    """Random points of one box, its two ends, and as many random corners: ``[P, ...]``."""
    random = np.random.default_rng(seed)
    share = random.uniform(size=(count, *lower.shape))
    share = np.concatenate([share, np.round(share), np.zeros_like(share[:1]), np.ones_like(share[:1])])
    return (lower + share * (upper - lower)).astype(lower.dtype)


# Against other computations.


def bounds_by_hand(weights, lower, upper):
    """Gowal et al.'s equations in numpy, as one reads them."""
    for layer, (kernel, bias) in enumerate(weights):
        middle, radius = (lower + upper) / 2 @ kernel + bias, (upper - lower) / 2 @ np.abs(kernel)
        lower, upper = middle - radius, middle + radius
        if layer < len(weights) - 1:
            lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
    return lower, upper


def margins_by_hand(weights, lower, upper, y):
    """The last layer's differences as a layer of their own, a row at a time."""
    kernel, bias = weights[-1]
    margins = []
    for row, label in enumerate(y):
        differences = (kernel[:, [label]] - kernel, bias[label] - bias)
        margins.append(bounds_by_hand([*weights[:-1], differences], lower[[row]], upper[[row]])[0][0])
    return np.array(margins)


def test_an_mlp_against_numpy(x64):
    weights, (lower, upper), y = dense_layers(), boxes(), np.array([0, 3, 1])
    found = interval_bounds(partial(mlp, weights), *as_array(lower, upper))
    np.testing.assert_allclose(found, bounds_by_hand(weights, lower, upper), rtol=1e-12, atol=1e-13)
    margins = interval_margins(partial(mlp, weights), *as_array(lower, upper, y))
    np.testing.assert_allclose(margins, margins_by_hand(weights, lower, upper, y), rtol=1e-12, atol=1e-13)
    assert (np.asarray(margins)[range(3), y] == 0).all()
    # Merged with the last layer they are tighter than differences of bounds.
    loose = np.take_along_axis(np.asarray(found[0]), y[:, None], 1) - np.asarray(found[1])
    assert (np.asarray(margins) >= loose - 1e-12).all()
    assert (np.asarray(margins) > loose + 1e-3).any()


def test_convolutions_against_pytorch(x64):
    module = jn.models.SmallCNN(3)
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 1))
    net = jn.from_linen(module)
    random = np.random.default_rng(1)
    params, stats = jax.tree.map(lambda leaf: random.normal(size=leaf.shape) / 5, jax.eval_shape(net.init, KEY, x))
    lower, upper = x - 0.02, x + 0.03
    ends = [torch.tensor(end.transpose(0, 3, 1, 2)) for end in (lower, upper)]
    for name, leaf in params.items():
        if name == "Dense_0":
            ends = [end.permute(0, 2, 3, 1).flatten(1) for end in ends]
        kernel, bias = torch.tensor(np.array(leaf["kernel"])), torch.tensor(np.array(leaf["bias"]))
        if name.startswith("Conv"):
            kernel = kernel.permute(3, 2, 0, 1)
            layer = partial(torch.nn.functional.conv2d, stride=2, padding=1)
        else:
            kernel, layer = kernel.T, torch.nn.functional.linear
        middle, radius = layer((ends[0] + ends[1]) / 2, kernel, bias), layer((ends[1] - ends[0]) / 2, kernel.abs())
        ends = [middle - radius, middle + radius]
        if name != "Dense_1":
            ends = [end.relu() for end in ends]
    found = interval_bounds(net.logits_fn(params, stats), *as_array(lower, upper))
    np.testing.assert_allclose(found, torch.stack(ends).numpy(), rtol=1e-11, atol=1e-12)


def test_a_linear_network_is_bounded_by_its_corners(x64):
    (kernel, bias), (lower, upper), y = dense_layers(sizes=(5, 4))[0], boxes(), np.array([0, 3, 1])
    corners = np.stack(np.meshgrid(*[[0, 1]] * 5), -1).reshape(-1, 1, 5)
    logits = (lower + corners * (upper - lower)) @ kernel + bias
    found = interval_bounds(lambda x: x @ kernel + bias, *as_array(lower, upper))
    np.testing.assert_allclose(found, (logits.min(0), logits.max(0)), rtol=1e-12, atol=1e-13)
    # In two layers bounds are looser; margins are exact, since all affine layers after the last curve are one.
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    network = lambda x: (2 * x - 1) @ rotation @ (rotation.T @ kernel) + bias  # noqa: E731
    logits = 2 * logits - kernel.sum(0) - bias
    assert (interval_bounds(network, *as_array(lower, upper))[0] < logits.min(0) - 0.01).any()
    exact = (logits[:, range(3), y][..., None] - logits).min(0)
    np.testing.assert_allclose(interval_margins(network, *as_array(lower, upper, y)), exact, rtol=1e-12, atol=1e-12)


def test_a_rising_network_has_its_bounds_at_the_ends(x64):
    weights, (lower, upper) = [(np.abs(kernel), bias) for kernel, bias in dense_layers()], boxes()
    network = lambda x: jnp.exp(jnp.tanh(mlp(weights, x)))  # noqa: E731
    found = interval_bounds(network, *as_array(lower, upper))
    np.testing.assert_allclose(found, (network(lower), network(upper)), rtol=1e-12)


@pytest.mark.slow
def test_without_room_bounds_are_the_logits():
    net, x = jn.from_linen(jn.models.ViT(patch=2, width=8, depth=1, heads=2, classes=3)), jnp.ones((2, 4, 4, 1)) / 3
    x = x * jnp.arange(32.0).reshape(x.shape) / 32
    model = net.logits_fn(*net.init(KEY, x))
    for end in interval_bounds(model, x, x):
        np.testing.assert_allclose(end, model(x), rtol=1e-5, atol=1e-5)


# Operation by operation.

WEIGHTS = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
_IMAGE = (-1, 2, 3, 1)

EXACT = {
    "relu": jax.nn.relu,
    "relu by choice": lambda x: jnp.where(x > 0, x, 0),
    "relu by what is left": lambda x: jnp.where(x <= 0, 0, x),
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "relu6": jax.nn.relu6,
    "piecewise_linear": layers.piecewise_linear,
    "threshold": layers.threshold,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "exp": jnp.exp,
    "log1p": lambda x: jnp.log1p(x + 6),
    "abs": jnp.abs,
    "square": jnp.square,
    "square by hand": lambda x: x * x,
    "cube": lambda x: x**3,
    "reciprocal": lambda x: 1 / (x + 6),
    "reciprocal square": lambda x: (x + 6) ** -2,
    "root": lambda x: jnp.sqrt(x + 6),
    "reciprocal root": lambda x: jax.lax.rsqrt(x + 6),
    "three quarters": lambda x: (x + 6) ** 0.75,
    "minus three quarters": lambda x: (x + 6) ** -0.75,
    "erf": jax.scipy.special.erf,
    "clamp": lambda x: jax.lax.clamp(-0.5, x, 0.25),
    "affine": lambda x: 3 - 2 * x / 5,
    "negative divisor": lambda x: x / -5,
    "sign": jnp.sign,
}

SOUND = {
    "dense": lambda x: x @ WEIGHTS,
    "product of halves": lambda x: jnp.concatenate([x[:, :3] * x[:, 3:], x[:, :3] / (4 + x[:, 3:])], axis=1),
    "bilinear": lambda x: jnp.einsum("bi,bj->bij", x[:, :2], x[:, 2:5]).reshape(-1, 6),
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "softplus": jax.nn.softplus,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "approximate gelu": jax.nn.gelu,
    "layer norm": lambda x: (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 0.1),
    "local response norm": partial(layers.local_response_norm, alpha=0.3),
    "maxout": lambda x: jnp.tile(layers.maxout(x), 2),
    "max pool": lambda x: jnp.tile(layers.max_pool(x.reshape(_IMAGE), (2, 1)).reshape(-1, 3), 2),
    "padded max pool": lambda x: layers.max_pool(x.reshape(_IMAGE), (2, 2), (1, 1), ((1, 0), (0, 1))).reshape(-1, 6),
    "flax's max pool": lambda x: nn.max_pool(x.reshape(_IMAGE), (2, 2), padding="SAME").reshape(-1, 6),
    "mean pool": lambda x: nn.avg_pool(x.reshape(_IMAGE), (2, 1)).reshape(-1, 3),
    "adaptive mean pool": lambda x: layers.adaptive_avg_pool(x.reshape(_IMAGE), (1, 2)).reshape(-1, 2),
    "maximum": lambda x: jnp.max(x, axis=1, keepdims=True) - jnp.min(x, axis=1, keepdims=True),
    "minimum": lambda x: jnp.minimum(x[:, :3], x[:, 3:]),
    "choice": lambda x: jnp.where(x[:, :3] > x[:, 3:], x[:, 3:] ** 2, -x[:, :3]),
    "choice of slopes": lambda x: jnp.where(x[:, :3] > x[:, 3:], -5 * x[:, 3:], x[:, :3] / 5),
    "choices": lambda x: jnp.where((x[:, :3] > 0) & ~(x[:, 3:] > 0), x[:, 3:], jnp.where(x[:, :3] != 0, 1.0, 2.0)),
    "sums": lambda x: jnp.cumsum(x, axis=1),
    "stacked": lambda x: jnp.stack([x[:, 0], x[:, 3], 2 * x[:, 0]], axis=1),
    "gather": lambda x: x[:, jnp.array([3, 1, 3])],
    "bools": lambda x: x.astype(bool) * (x + 1),
    "rows split": lambda x: sum(jnp.split(x, 3, axis=1)),
    "the greater one of copies": lambda x: jnp.maximum(x[:, :1], x @ WEIGHTS) + jnp.maximum(x @ WEIGHTS, x[:, 1:2]),
    "checkpointed": jax.checkpoint(lambda x: jnp.tanh(x) @ WEIGHTS),
    "once more": jax.jit(lambda x: x + x[:, ::-1]),
}


@jax.custom_vjp
def own_gradient(x):
    return jnp.exp(x)


own_gradient.defvjp(lambda x: (jnp.exp(x), None), lambda _, cotangent: (cotangent,))
SOUND["its own gradient"] = own_gradient


def _together(operations):
    """One network of all operations side by side, and the places of each one's logits."""
    places, start = {}, 0
    for name, operation in operations.items():
        width = jax.eval_shape(operation, jnp.zeros((1, 6))).shape[1]
        places[name] = slice(start, start + width)
        start += width
    return (lambda x: jnp.concatenate([operation(x) for operation in operations.values()], axis=1)), places


@pytest.mark.parametrize("operations", [EXACT, SOUND], ids=["exact", "sound"])
def test_operations_stay_inside_their_bounds(operations):
    network, places = _together(operations)
    lower, upper = (end.astype(np.float32) for end in boxes(seed=1, rows=8, inputs=6, width=0.8))
    least, most = map(np.asarray, interval_bounds(network, *as_array(lower, upper)))
    points = np.stack([points_inside(*row) for row in zip(lower, upper, strict=True)], axis=1)
    grid = lower + np.linspace(0, 1, 2001, dtype=np.float32)[:, None, None] * (upper - lower)
    points = np.concatenate([points, grid])
    values = np.asarray(jax.jit(network)(jnp.asarray(points.reshape(-1, 6)))).reshape(*points.shape[:2], -1)
    for name, place in places.items():
        seen = values[..., place]
        tolerance = 1e-5 * (1 + np.abs(seen).max())
        assert (least[:, place] <= seen.min(0) + tolerance).all(), name
        assert (most[:, place] >= seen.max(0) - tolerance).all(), name
        # Of an operation on one entry alone, the extremes are among the grid's points or close to them.
        room = 2e-3 if operations is EXACT else 30 * (0.1 + np.ptp(seen, axis=0))
        assert (least[:, place] >= seen.min(0) - room).all(), name
        assert (most[:, place] <= seen.max(0) + room).all(), name


@pytest.mark.parametrize("margins", [interval_margins, crown_margins])
def test_margins_of_operations_are_never_above_the_true_ones(margins):
    """Each against each, so that every operation is bounded from both sides on the way back."""
    network, places = _together({**EXACT, **SOUND})
    lower, upper = (end.astype(np.float32) for end in boxes(seed=2, rows=6, inputs=6, width=0.8))
    y = np.array([places[name].start for name in ("relu", "choice", "bilinear", "max pool", "softmax", "leaky_relu")])
    found = np.asarray(margins(network, *as_array(lower, upper, y)))
    points = np.stack([points_inside(*row, count=300) for row in zip(lower, upper, strict=True)], axis=1)
    values = np.asarray(jax.jit(network)(jnp.asarray(points.reshape(-1, 6)))).reshape(*points.shape[:2], -1)
    true = (values[:, range(6), y][..., None] - values).min(0)
    for name, place in places.items():
        tolerance = 1e-5 * (1 + np.abs(values[..., place]).max())
        assert (found[:, place] <= true[:, place] + tolerance).all(), name


@given(seed=st.integers(0, 2**16), width=st.sampled_from([0.0, 1e-3, 0.1, 1.0]))
def test_points_of_an_mlp_stay_inside(seed, width):
    lower, upper = (end.astype(np.float32) for end in boxes(seed, rows=2, width=width))
    least, most = (np.asarray(end) for end in _bounds_of_mlp(*as_array(lower, upper)))
    for row in range(2):
        values = np.asarray(mlp(NARROW, points_inside(lower[row], upper[row], 50, seed)))
        assert (values >= least[row] - 1e-5).all()
        assert (values <= most[row] + 1e-5).all()


NARROW = [tuple(np.asarray(part, np.float32) for part in layer) for layer in dense_layers()]
_bounds_of_mlp = partial(interval_bounds, partial(mlp, NARROW))


def test_a_divisor_that_may_be_zero_gives_infinite_bounds():
    lower, upper = interval_bounds(lambda x: 1 / x, jnp.array([[-1.0, 1.0]]), jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(lower, [[-np.inf, 0.5]])
    np.testing.assert_array_equal(upper, [[np.inf, 1.0]])


@pytest.mark.parametrize("compare", [lambda x: x <= 5, lambda x: ~(x > 5)])
def test_comparisons_with_what_may_be_no_number_are_not_certain(compare):
    """The logarithm of the lower end is NaN, with which every comparison is false."""
    lower, upper = interval_bounds(lambda x: jnp.where(compare(jnp.log(x)), 1.0, -1.0), *jnp.array([[[-1.0]], [[1.0]]]))
    assert (lower, upper) == (-1, 1)


# Networks.

NETWORKS = {
    "SmallCNN": (jn.models.SmallCNN(), (8, 8, 1), 0.01),
    "overlapping pooling": (
        jn.models.ResNet((1,), jn.models.resnet.BasicBlock, 5, 4, jn.models.imagenet_stem), (12, 12, 3), 0.002
    ),
    "MadryCNN": (jn.models.MadryCNN(), (28, 28, 1), 0.01),
    "LeNet5": (jn.models.LeNet5(), (28, 28, 1), 0.01),
    "LeNet5.modern": (jn.models.LeNet5.modern(), (28, 28, 1), 0.01),
    "resnet18": (jn.models.resnet18(10, width=4, stem=jn.models.cifar_stem), (16, 16, 3), 0.001),
    "preact_resnet18": (jn.models.preact_resnet18(10, width=4), (16, 16, 3), 0.001),
    "RBFNetwork": (jn.models.RBFNetwork(20, 3), (6,), 0.01),
}  # fmt: skip
QUICK = ("overlapping pooling",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_networks_under_attack_stay_inside_their_bounds(name):
    """Attacked points, random ones and corners, with the statistics of a network that has been trained."""
    module, shape, epsilon = NETWORKS[name]
    net, threat = jn.from_linen(module), jn.Linf(epsilon)
    x = np.asarray(jax.random.uniform(KEY, (2, *shape)))
    params, stats = jax.jit(net.init)(KEY, x)
    random = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: leaf + 0.02 * random.normal(size=leaf.shape).astype(np.float32), params)
    stats = jax.jit(net.train)(params, stats, x, KEY)[1]
    model, y = net.logits_fn(params, stats), jnp.array([0, 1])
    lower, upper = box(threat, jnp.asarray(x))
    least, most = (np.asarray(end) for end in interval_bounds(model, lower, upper))
    margins = np.asarray(interval_margins(model, lower, upper, y))
    for label in (y, jnp.array([2, 2])):
        attack = partial(jn.attacks.pgd, threat=threat, steps=5, loss=jn.losses.margin)
        points = [attack(KEY, model, jnp.asarray(x), label)]
        points += list(
            np.stack([points_inside(*row, count=4) for row in zip(*map(np.asarray, (lower, upper)), strict=True)], 1)
        )
        logits = np.asarray(jax.lax.map(model, jnp.stack(points)))
        tolerance = 1e-5 * np.abs(logits).max()
        assert (logits >= least - tolerance).all()
        assert (logits <= most + tolerance).all()
        assert (logits[:, [0, 1], y][..., None] - logits >= margins - tolerance).all()
    assert np.isfinite(most - least).all()
    assert (most > least).all()


# As a part of programs.


def test_a_row_does_not_depend_on_its_batch():
    lower, upper = (end.astype(np.float32) for end in boxes(rows=7))
    together = _bounds_of_mlp(*as_array(lower, upper))
    elsewhere = np.where(np.arange(7)[:, None] == 3, 0, 1).astype(np.float32)
    changed = _bounds_of_mlp(*as_array(lower - elsewhere, upper + elsewhere))
    np.testing.assert_array_equal(together[0][3], changed[0][3])
    alone = _bounds_of_mlp(*as_array(lower[3:4], upper[3:4]))
    np.testing.assert_allclose([end[0] for end in alone], [end[3] for end in together], atol=1e-6)


def test_new_parameters_mean_no_new_trace():
    traces = []

    def network(kernel, x):
        traces.append(0)
        return x @ kernel

    lower, upper = as_array(*boxes())
    for scale in (1.0, 2.0):
        interval_bounds(jax.tree_util.Partial(network, scale * jnp.ones((5, 3))), lower, upper)
    assert len(traces) == 1


def test_gradients_against_finite_differences(x64):
    weights, (lower, upper), y = dense_layers(), as_array(*boxes()), jnp.array([0, 3, 1])

    @jax.jit
    def value(weights):
        network = jax.tree_util.Partial(mlp, weights)
        ends = interval_bounds(network, lower, upper)
        return jnp.sum(jnp.sin(ends[0]) + ends[1] ** 2) + jnp.sum(jnp.cos(interval_margins(network, lower, upper, y)))

    gradient, random = jax.jit(jax.grad(value))(weights), np.random.default_rng(5)
    for _ in range(5):
        assert_slope(value, gradient, weights, random, rtol=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda x: jnp.sort(x, axis=1), "'sort'"),
        (lambda x: jnp.asarray(WEIGHTS)[jnp.argmax(x, axis=1)], "'argmax'"),
        (lambda x: jnp.take(x, jnp.floor(x[:, 0]).astype(int), axis=1), "'convert_element_type'"),
        (lambda x: 2.0**x, "exponent"),
        (lambda x: jax.lax.fori_loop(0, 2, lambda _, x: x / 2, x), "'scan'|'while'"),
    ],
    ids=["sort", "argmax", "integers", "exponent", "loop"],
)
def test_operations_without_a_rule_are_named(network, named):
    with pytest.raises(NotImplementedError, match=named):
        interval_bounds(network, jnp.zeros((2, 6)), jnp.ones((2, 6)))


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((2, 6))
    with pytest.raises(
        ValueError, match=r"one shape \[B, ...\], a box for each row, got float32\[2, 6\] and float32\[6\]"
    ):
        interval_bounds(lambda x: x, x, x[0])
    with pytest.raises(ValueError, match=r"int32\[2, 6\]"):
        interval_bounds(lambda x: x, x.astype(int), x.astype(int))
    with pytest.raises(ValueError, match=r"must return \[B, K\] with B = 1 row as x has, got \[1\]"):
        interval_bounds(lambda x: x[:, 0], x, x)
    with pytest.raises(ValueError, match="one integer class for each of 2 rows"):
        interval_margins(lambda x: x, x, x, jnp.zeros(3, int))
