"""Bounds in L2 and L1: exact for one affine layer, against numpy behind ReLU, and never above what a ball holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_differences import assert_slope

import jaxnets as jn
from jaxnets.certificates import certified, crown_margins, interval_bounds, interval_margins, tightest_margins
from jaxnets.certificates.rows import margins_within
from jaxnets.evaluation import evaluate

KEY = jax.random.key(0)
EPSILON = 0.3
THREATS = {"l2": jn.L2(EPSILON, -9, 9), "l1": jn.L1(EPSILON, -9, 9)}
DUAL = {"l2": 2, "l1": np.inf}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def differences(y, classes):
    """Of logits, ``[B, K, K]``: what is multiplied by them to get ``z_y - z_k``."""
    return np.eye(classes)[y][:, None] - np.eye(classes)


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("margins", [interval_margins, crown_margins, tightest_margins])
def test_one_affine_layer_is_exact(name, margins, x64):
    """Normalised, turned and padded first, as data are."""
    W, b, x, y = normal(14, 3), normal(3, seed=1), normal(4, 2, 6, seed=2), np.array([0, 2, 1, 0])
    scale = np.abs(normal(6, seed=3)) + 0.5

    def network(x):
        rows = jnp.pad(-(x - 0.5) / scale, ((0, 0), (0, 0), (1, 0)))[:, :, ::-1]
        return rows.swapaxes(1, 2).reshape(len(x), -1) @ W + b

    found = margins_within(margins, network, THREATS[name], jnp.asarray(x), jnp.asarray(y))
    jacobian = np.asarray(jax.jacobian(lambda x: network(x[None])[0])(jnp.asarray(x[0]))).reshape(3, -1)
    wanted = differences(y, 3)
    reach = EPSILON * np.linalg.norm(wanted @ jacobian, DUAL[name], axis=-1)
    expected = np.einsum("bkj,bj->bk", wanted, network(x)) - reach
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    least, _ = interval_bounds(network, x - EPSILON, x + EPSILON, norm=2)
    np.testing.assert_allclose(least, network(x) - EPSILON * np.linalg.norm(jacobian, axis=1), rtol=1e-12)


CURVED = {
    "as bools": lambda x: (x - 0.5).astype(bool).astype(x.dtype),
    "as a divisor": lambda x: 1 / (x + 5),
    "squared": lambda x: x * x,
    "of each other": lambda x: x * x[:, ::-1],
}


@pytest.mark.parametrize("how", CURVED)
def test_deviations_that_are_bent_are_bounded_as_a_box(how, x64):
    x = jnp.asarray(normal(1, 4, seed=2))
    box = [interval_bounds(CURVED[how], x - EPSILON, x + EPSILON, norm=norm) for norm in (2, np.inf)]
    np.testing.assert_array_equal(*box)
    summed = lambda x: CURVED[how](x) @ jnp.ones((4, 2))  # noqa: E731
    sums = [interval_bounds(summed, x - EPSILON, x + EPSILON, norm=norm) for norm in (2, np.inf)]
    np.testing.assert_allclose(*sums, rtol=1e-12)


REPEATED = {
    "add": lambda x: x + jnp.zeros(3),
    "div": lambda x: x / jnp.array([1.0, 2.0, 4.0]),
    "mul": lambda x: jnp.array([1.0, 2.0, 4.0]) * x,
    "pad": lambda x: jax.lax.pad(jnp.zeros((1, 1)), x[0, 0], [(0, 0, 0), (1, 1, 0)]),
    "sub": lambda x: x - jnp.array([1.0, 2.0, 4.0]),
}


@pytest.mark.parametrize("how", REPEATED)
@pytest.mark.parametrize("norm", [1, 2])
def test_copies_of_an_entry_are_longer_together(how, norm, x64):
    """A grey pixel behind three means or deviations: all of its copies move at once."""

    def network(x):
        copies = REPEATED[how](x)
        return copies @ jnp.ones((copies.size, 1))

    x = jnp.full((1, 1), 0.5)
    found = interval_bounds(network, x - EPSILON, x + EPSILON, norm=norm)
    np.testing.assert_allclose(found, [network(x - EPSILON), network(x + EPSILON)], rtol=1e-12)


def crown_by_hand(layers, x, y, dual):
    """One hidden layer, bounded by the length of its weights; the ball in norm 1 lies in that of norm 2 there."""
    (W, b), (V, c) = layers
    middle, radius = x @ W + b, EPSILON * np.linalg.norm(W, axis=0)
    low, high = middle - radius, middle + radius
    margins = np.zeros((len(x), len(c)))
    for row, wanted in enumerate(differences(y, len(c))):
        for k, v in enumerate(wanted @ V.T):
            slope, intercept = np.zeros_like(v), 0.0
            for unit, (least, most) in enumerate(zip(low[row], high[row], strict=True)):
                if least >= 0:
                    slope[unit] = 1
                elif most > 0 and v[unit] > 0:
                    slope[unit] = most > -least
                elif most > 0:
                    slope[unit] = most / (most - least)
                    intercept -= v[unit] * slope[unit] * least
            A = W @ (v * slope)
            reach = EPSILON * np.linalg.norm(A, dual)
            margins[row, k] = wanted[k] @ c + intercept + v * slope @ b + A @ x[row] - reach
    return margins


def problem():
    return [(normal(5, 8), normal(8, seed=1)), (normal(8, 4, seed=2), normal(4, seed=3))], normal(6, 5, seed=4) / 2


def mlp(layers, x):
    (W, b), (V, c) = layers
    return jax.nn.relu(x @ W + b) @ V + c


@pytest.mark.parametrize("name", THREATS)
def test_an_mlp_against_numpy(name, x64):
    (layers, x), y = problem(), np.arange(6) % 4
    found = margins_within(crown_margins, partial(mlp, layers), THREATS[name], jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, crown_by_hand(layers, x, y, DUAL[name]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "VALID"), (3, [(2, 1), (0, 3)])])
def test_a_convolution_is_exact_at_its_borders_too(stride, padding, x64):
    """Against the lengths of the rows of its Jacobian."""
    kernel, x = jnp.asarray(normal(3, 3, 2, 5)), jnp.asarray(normal(1, 7, 8, 2, seed=1))

    def network(x):
        x = (x - 0.2) * jnp.array([2.0, 0.5])
        return jn.models.layers.conv_general_dilated(x, kernel, (stride, stride), padding).reshape(len(x), -1)

    least, most = interval_bounds(network, x - EPSILON, x + EPSILON, norm=2)
    jacobian = np.asarray(jax.jacobian(network)(x)).reshape(least.shape[1], -1)
    radius = EPSILON * np.linalg.norm(jacobian, axis=1)
    np.testing.assert_allclose(least[0], network(x)[0] - radius, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(most[0], network(x)[0] + radius, rtol=1e-10, atol=1e-12)


DOUBLED = {
    "concatenated": lambda x: jnp.concatenate([x, x], axis=1),
    "tiled": lambda x: jnp.tile(x, (1, 2)),
    "gathered": lambda x: x[:, jnp.array([0, 1, 2, 0, 1, 2])],
    "summed": lambda x: jnp.cumsum(jnp.concatenate([x, 0 * x], axis=1), axis=1),
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (len(x), 2, 3)).reshape(len(x), 6),
    "of two": lambda x: jnp.concatenate([x + x[:, ::-1], x - x[:, ::-1]], axis=1),
}


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("how", DOUBLED)
def test_entries_that_come_twice_move_together(how, name, x64):
    """Their length is more than that of the ball: bounds that took them for others would be too tight."""
    W, x, y = np.ones((6, 2)) * [1, -1], jnp.asarray(normal(2, 3)), jnp.array([0, 1])
    network = lambda x: DOUBLED[how](x) @ W + 0.1  # noqa: E731
    jacobian = np.asarray(jax.jacobian(lambda x: network(x[None])[0])(x[0]))
    true_reach = EPSILON * np.linalg.norm(jacobian, DUAL[name], axis=1)
    least, most = interval_bounds(network, x - EPSILON, x + EPSILON, norm=2 if name == "l2" else 1)
    assert (least <= network(x) - true_reach + 1e-12).all()
    assert (most >= network(x) + true_reach - 1e-12).all()
    wanted = differences(np.asarray(y), 2)
    expected = np.einsum("bkj,bj->bk", wanted, network(x))
    expected -= EPSILON * np.linalg.norm(wanted @ jacobian, DUAL[name], axis=-1)
    found = margins_within(crown_margins, network, THREATS[name], x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


NETWORKS = {
    "mlp": (jn.models.MLP((30, 30)), (4, 4, 1)),
    "small_cnn": (jn.models.SmallCNN(), (8, 8, 1)),
    "resnet18": pytest.param(
        jn.models.resnet18(10, width=4, stem=jn.models.cifar_stem), (16, 16, 3), marks=pytest.mark.slow
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize(("module", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_margins_of_networks_under_attack_are_never_below(module, shape, name):
    net, threat = jn.normalized(jn.from_linen(module), 0.5, 0.25), THREATS[name]
    x, y = jax.random.uniform(KEY, (2, *shape)), jnp.array([0, 1])
    params, stats = jax.jit(net.init)(KEY, x)
    model = net.logits_fn(params, stats)
    margins = np.asarray(margins_within(tightest_margins, model, threat, x, y))
    assert np.isfinite(margins).all()
    points = [x]
    for label in (y, y + 1):
        points.append(jn.attacks.pgd(KEY, model, x, label, threat=threat, steps=10, loss=jn.losses.margin))
    logits = np.asarray(jax.lax.map(model, jnp.stack(points)))
    true = logits[:, [0, 1], y][..., None] - logits
    assert (true >= margins - 1e-5 * np.abs(logits).max()).all()
    in_the_box = tightest_margins(model, x - EPSILON, x + EPSILON, y)
    others = np.arange(10) != np.asarray(y)[:, None]
    assert (margins > np.asarray(in_the_box))[others].all()


def test_gradients_against_finite_differences(x64):
    (layers, x), y = problem(), jnp.arange(6) % 4

    @jax.jit
    def value(layers):
        model = jax.tree_util.Partial(mlp, layers)
        return jnp.sum(jnp.cos(margins_within(crown_margins, model, THREATS["l2"], jnp.asarray(x), y)))

    gradient, random = jax.jit(jax.grad(value))(layers), np.random.default_rng(5)
    for _ in range(5):
        assert_slope(value, gradient, layers, random, rtol=1e-6)
    without_weights = [(0 * layers[0][0], layers[0][1]), layers[1]]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(value))(without_weights)))


@pytest.mark.parametrize("name", THREATS)
def test_certified_rows_beside_attacked_ones(name):
    """Two classes on either side of a line, told apart by a network that is not linear: all of the gap is small."""
    x = np.random.default_rng(0).uniform(0, 1, (200, 2)).astype(np.float32)
    lead = lambda x: jnp.stack([jax.nn.relu(x[:, 0]), jax.nn.relu(x[:, 1])], axis=1)  # noqa: E731
    y = np.asarray(jnp.argmax(lead(x), axis=1))
    threat = (jn.L2 if name == "l2" else jn.L1)(0.1)
    strong = {"pgd": partial(jn.attacks.pgd, threat=threat, steps=20, loss=jn.losses.margin)}
    report = evaluate(
        KEY, lead, x, y, strong, threat=threat, certificates={"bounds": partial(certified, threat=threat)}
    )
    gap = np.abs(x[:, 0] - x[:, 1])
    inside = (x.min(axis=1) > 0.1) & (x.max(axis=1) < 0.9)
    reach = 0.1 * (2**0.5 if name == "l2" else 1)
    np.testing.assert_array_equal(report.certified["bounds"][inside], (gap > reach)[inside])
    low, high = report.bounds()
    assert 0.5 < low <= high < 1


def test_other_norms_are_refused():
    with pytest.raises(ValueError, match="norm must be 1, 2 or infinity, got 3"):
        interval_bounds(lambda x: x, jnp.zeros((1, 2)), jnp.ones((1, 2)), norm=3)
