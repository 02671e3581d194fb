"""Layers against PyTorch's in double precision, values and all gradients; units and initialisers by closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets import models
from jaxnets.models import layers
from jaxnets.models.resnet import BasicBlock, Bottleneck


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def images_first(torch, function):
    """A function of PyTorch on images ``[B, H, W, C]``, and on anything else after them."""

    def on_images(x, *others):
        out = function(x.permute(0, 3, 1, 2), *others)
        return out.permute(0, 2, 3, 1)

    return on_images


def assert_same_as_torch(torch, ours, theirs, *arrays):
    """Values, and the gradients along a random direction with respect to all arguments."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    direction = normal(*expected.shape, seed=1)
    expected.backward(torch.from_numpy(direction))

    @jax.jit
    def value_and_gradients(arrays, direction):
        value, pull = jax.vjp(ours, *arrays)
        return value, pull(direction)

    got = value_and_gradients(arrays, direction)
    expected = expected.detach().numpy(), tuple(tensor.grad.numpy() for tensor in tensors)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, expected)


# Normalisation.


@pytest.mark.parametrize("size", [5, 4, 1])
def test_local_response_norm(size, torch, x64):
    """PyTorch's alpha is divided by the number of channels."""
    theirs = torch.nn.LocalResponseNorm(size, alpha=0.3 * size, beta=0.75, k=2.0)
    ours = partial(layers.local_response_norm, size=size, alpha=0.3)
    assert_same_as_torch(torch, ours, images_first(torch, theirs), normal(2, 3, 4, 7))


def batch_norms(torch, shape, momentum, eps):
    """Ours and PyTorch's with the same random running statistics: ``(x, scale, bias) -> (out, mean, var)``."""
    features, mean = shape[-1], normal(shape[-1], seed=2)
    var = np.exp(normal(features, seed=3))

    def ours(train, x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
        module = layers.BatchNorm(momentum, eps)
        out, moved = module.apply(variables, x, train, mutable=["batch_stats"])
        return out, moved["batch_stats"]

    def theirs(train, x, scale, bias):
        statistics = torch.tensor(mean), torch.tensor(var)
        flat = x.reshape(-1, features)
        out = torch.nn.functional.batch_norm(flat, *statistics, scale, bias, train, momentum, eps)
        return out.reshape(x.shape), {"mean": statistics[0].numpy(), "var": statistics[1].numpy()}

    return ours, theirs


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("shape", "momentum", "eps"), [((3, 4, 5, 6), 0.1, 1e-5), ((7, 3), 0.25, 1e-3)], ids=["images", "rows"]
)
def test_batch_norm(shape, momentum, eps, train, torch, x64):
    ours, theirs = batch_norms(torch, shape, momentum, eps)
    arrays = 3 * normal(*shape) + 2, normal(shape[-1], seed=4), normal(shape[-1], seed=5)
    values = (lambda *args: ours(train, *args)[0]), (lambda *args: theirs(train, *args)[0])
    assert_same_as_torch(torch, *values, *arrays)
    moved, expected = ours(train, *arrays)[1], theirs(train, *map(torch.tensor, arrays))[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), moved, expected)


def test_layer_norm(torch, x64):
    def ours(x, scale, bias):
        return layers.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)

    def theirs(x, scale, bias):
        return torch.nn.functional.layer_norm(x, (6,), scale, bias)

    arrays = 0.01 * normal(2, 3, 6) + 1, normal(6, seed=2), normal(6, seed=3)
    assert_same_as_torch(torch, ours, theirs, *arrays)


# Convolution.


@pytest.mark.parametrize(
    ("groups", "dilation", "stride", "padding"), [(1, 1, 1, 0), (2, 1, 2, 1), (4, 1, 1, 2), (1, 2, 1, 2), (2, 3, 2, 3)]
)
def test_grouped_and_dilated_convolution(groups, dilation, stride, padding, torch, x64):
    settings = {"strides": stride, "padding": padding, "kernel_dilation": dilation, "feature_group_count": groups}

    def ours(x, kernel, bias):
        return layers.Conv(8, (3, 3), **settings).apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def theirs(x, kernel, bias):
        kernel = kernel.permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(x, kernel, bias, stride, padding, dilation, groups)

    arrays = normal(2, 9, 8, 4), normal(3, 3, 4 // groups, 8, seed=2), normal(8, seed=3)
    assert_same_as_torch(torch, ours, images_first(torch, theirs), *arrays)


# Pooling.


def with_ties(*shape):
    """Few different values: every window has equal ones."""
    return np.random.default_rng(0).integers(0, 3, shape).astype(float)


@pytest.mark.parametrize("values", [normal, with_ties])
@pytest.mark.parametrize(
    ("window", "stride", "padding", "ceil"),
    [(2, 2, 0, False), (3, 2, 0, False), (3, 1, 1, False), (3, 2, 1, False), (3, 2, 0, True), (2, 2, 0, True),
     (3, 2, 1, True)],
)  # fmt: skip
def test_max_pool(window, stride, padding, ceil, values, torch, x64):
    """In ceil mode windows may reach over the end: for us, padding there."""
    edge = (padding, padding + (stride - 1) * ceil)
    ours = partial(layers.max_pool, window=(window, window), strides=(stride, stride), padding=(edge, edge))
    theirs = torch.nn.MaxPool2d(window, stride, padding, ceil_mode=ceil)
    assert_same_as_torch(torch, ours, images_first(torch, theirs), values(2, 6, 7, 3))


@pytest.mark.parametrize("padding", [((0, 0), (3, 0)), ((0, 4), (0, 0))])
def test_a_window_of_padding_alone_has_no_maximum(padding):
    with pytest.raises(ValueError, match="a pooling window of padding alone"):
        layers.max_pool(jnp.zeros((1, 7, 7, 1)), (3, 3), (4, 4), padding)


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (5, 3, 0), (3, 2, 1)])
def test_avg_pool(window, stride, padding, torch, x64):
    pad = ((padding, padding),) * 2
    ours = partial(layers.avg_pool, window=(window, window), strides=(stride, stride), padding=pad)
    theirs = torch.nn.AvgPool2d(window, stride, padding)
    assert_same_as_torch(torch, ours, images_first(torch, theirs), normal(2, 9, 8, 3))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 6), (9, 8)])
def test_adaptive_avg_pool(size, torch, x64):
    """To smaller images, to the same, and to larger ones."""
    ours, theirs = partial(layers.adaptive_avg_pool, size=size), torch.nn.AdaptiveAvgPool2d(size)
    assert_same_as_torch(torch, ours, images_first(torch, theirs), normal(2, 7, 6, 3))


# Units.

UNITS = {
    "identity": (layers.identity, lambda x: x, np.ones_like),
    "threshold": (layers.threshold, lambda x: 1.0 * (x >= 0), np.ones_like),  # its derivative is the identity's
    "piecewise_linear": (
        layers.piecewise_linear, lambda x: np.clip(x + 0.5, 0, 1), lambda x: 1.0 * (np.abs(x) < 0.5)
    ),
    "logistic": (
        partial(layers.logistic, alpha=3.0), lambda x: 1 / (1 + np.exp(-3 * x)), lambda x: 3 / (2 + 2 * np.cosh(3 * x))
    ),
    "tanh": (layers.tanh, np.tanh, lambda x: 1 / np.cosh(x) ** 2),
    "relu": (layers.relu, lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0)),
    "leaky_relu": (layers.leaky_relu, lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1.0, 0.01)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_units_and_their_slopes(name, x64):
    ours, value, slope = UNITS[name]
    x = np.array([-2.0, -0.6, -0.4, -1e-3, 1e-3, 0.4, 0.6, 2.0])
    np.testing.assert_allclose(ours(x), value(x), rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(ours)))(x), slope(x), rtol=1e-12)


def test_units_at_zero():
    assert layers.threshold(0.0) == 1
    assert layers.piecewise_linear(jnp.zeros(())) == 0.5
    for alpha in (0.5, 1.0, 8.0):
        np.testing.assert_allclose(jax.grad(layers.logistic)(0.0, alpha), alpha / 4, rtol=1e-6)
    x = np.array([-0.1, 0.1], np.float32)
    np.testing.assert_allclose(layers.logistic(x, alpha=1e4), layers.threshold(x))


def test_softmax(x64):
    x = normal(4, 5) + 800  # too large for exp
    powers = np.exp(x - 800)
    np.testing.assert_allclose(layers.softmax(x), powers / powers.sum(axis=1, keepdims=True), rtol=1e-10)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_maxout(pieces, x64):
    x, direction = normal(2, 4, 6), normal(2, 4, 6 // pieces, seed=1)
    value, pull = jax.vjp(partial(layers.maxout, pieces=pieces), x)
    groups = x.reshape(2, 4, -1, pieces)
    np.testing.assert_array_equal(value, groups.max(axis=-1))
    winners = groups == groups.max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(pull(direction)[0], (winners * direction[..., None]).reshape(x.shape))


@pytest.mark.parametrize("pieces", [2, 3])
def test_maxout_shares_the_gradient_between_equals(pieces):
    shares = jax.grad(lambda x: layers.maxout(x, pieces).sum())(jnp.ones(2 * pieces)).reshape(2, pieces)
    assert (shares > 0).all()
    np.testing.assert_array_equal(shares.sum(axis=1), [1, 1])


def test_maxout_of_what_does_not_divide_raises():
    with pytest.raises(ValueError, match="takes a multiple of 3 features, got 4"):
        layers.maxout(jnp.ones((2, 4)), pieces=3)


@pytest.mark.parametrize("width", [0.0, -1.0])
def test_radial_basis_of_no_width_is_refused(width):
    with pytest.raises(ValueError, match=f"takes a width above 0, got {width}"):
        layers.RadialBasis(3, width=width).init(jax.random.key(0), jnp.ones((1, 2)))


def test_radial_basis(x64):
    module, x = layers.RadialBasis(3, width=0.7), normal(5, 2)
    params = {"centers": normal(3, 2, seed=1), "log_width": np.log([0.5, 0.7, 2.0])}
    first = module.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(np.exp(first["log_width"]), 0.7)
    squared = ((x[:, None] - params["centers"]) ** 2).sum(axis=-1)
    expected = np.exp(-squared / (2 * np.array([0.5, 0.7, 2.0]) ** 2))
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-12)

    def loss(params, x):
        return jnp.sum(jnp.sin(module.apply({"params": params}, x)))

    jax.test_util.check_grads(jax.jit(loss), (params, x), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fact of the CPU backend")
def test_what_relu_gives_is_computed_once():
    """Not again, with all that is before it, for the gradient of the convolution after it by its kernel."""

    def products(relu):
        def loss(kernel, x, scale):
            return jnp.sum(layers.conv_general_dilated(relu(x * scale + 1), kernel, (1, 1), "SAME") ** 2)

        arguments = jnp.ones((3, 3, 4, 4)), jnp.ones((2, 8, 8, 4)), jnp.ones(4)
        return jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text().count(" multiply(")

    assert products(layers.relu) < products(jax.nn.relu), "XLA no longer needs help"


# Initialisers.


@pytest.mark.parametrize("shape", [(300, 500), (3, 5, 40, 60)], ids=["dense", "convolution"])
@pytest.mark.parametrize(
    ("name", "variance"),
    [("lecun", lambda n, m: 1 / n), ("glorot", lambda n, m: 2 / (n + m)), ("he", lambda n, m: 2 / n)],
)
def test_variances_of_initialisers(name, variance, shape):
    kernel = np.asarray(getattr(layers, name)(jax.random.key(0), shape))
    places = np.prod(shape[:-2])
    expected = variance(places * shape[-2], places * shape[-1])
    # The variance of a sample of N has a relative deviation of about sqrt(2 / N): below 0.01 here.
    np.testing.assert_allclose(kernel.var(), expected, rtol=0.05)
    assert abs(kernel.mean()) < 5 * np.sqrt(expected / kernel.size)
    # A normal distribution cut off at two deviations is left with 0.8796 of its own.
    assert 1.9 < 0.8796 * abs(kernel).max() / np.sqrt(expected) < 2.001


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (3, 3, 5, 20)])
def test_orthogonal_kernels_keep_lengths(shape):
    kernel = np.asarray(layers.orthogonal(jax.random.key(0), shape)).reshape(-1, shape[-1])
    product = kernel.T @ kernel if len(kernel) >= shape[-1] else kernel @ kernel.T
    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-5)


# Memory.

REMAT = {
    "alexnet": partial(models.AlexNet.small, width=8),
    "zfnet": partial(models.ZFNet.small, width=8),
    "vgg13_bn": partial(models.vgg13_bn, 10, width=8, hidden=16, places=1),
    "googlenet": partial(models.GoogLeNet.small, width=1 / 8),
    "resnet18": partial(models.resnet18, 10, width=8, stem=models.cifar_stem),
    "resnet of bottlenecks": partial(models.ResNet, (2, 2), Bottleneck, 10, 8, models.cifar_stem),
    "preact_resnet18": partial(models.preact_resnet18, width=8),
    "wide resnet": partial(models.WideResNet, 16, 2),
    "vit": partial(models.ViT, patch=4, width=24, depth=3, heads=3, classes=10),
}


def kept(module):
    """Bytes that the backward pass of a training step keeps, beside the parameters."""
    net, x = jn.from_linen(module), jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
    key = jax.random.key(0)
    params, stats = jax.eval_shape(net.init, key, x)

    def pull(params, stats, x):
        return jax.vjp(lambda params, x: net.train(params, stats, x, key)[0], params, x)[1]

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32)

    return size(jax.eval_shape(pull, params, stats, x)) - size(params)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "googlenet" else name for name in REMAT]
)
def test_remat_keeps_less(name):
    make = REMAT[name]
    assert kept(make(remat=True)) < 0.35 * kept(make())


def test_remat_changes_no_value_and_no_gradient():
    x = normal(4, 6, 6, 3).astype(np.float32)
    plain, remade = (layers.remat_if(remat, BasicBlock)(4) for remat in (False, True))
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    again = jax.eval_shape(lambda x: remade.init(jax.random.key(0), x, False), x)
    assert jax.tree.structure(again) == jax.tree.structure(variables)

    def everything(block):
        def loss(params, x):
            out, moved = block.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(out)), moved

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *map(everything, (plain, remade)))


# Half precision.

LAYERS = {
    "local_response_norm": layers.local_response_norm,
    "batch_norm": lambda x: layers.BatchNorm().init_with_output(jax.random.key(0), x, train=True)[0],
    "layer_norm": lambda x: layers.LayerNorm(dtype=x.dtype).init_with_output(jax.random.key(0), x)[0],
    "conv": lambda x: layers.Conv(8, (3, 3), dtype=x.dtype).init_with_output(jax.random.key(0), x)[0],
    "max_pool": partial(layers.max_pool, window=(3, 3), strides=(2, 2), padding=((0, 1), (0, 1))),
    "avg_pool": layers.avg_pool,
    "adaptive_avg_pool": partial(layers.adaptive_avg_pool, size=(3, 4)),
    "maxout": layers.maxout,
    **{name: unit for name, (unit, *_) in UNITS.items()},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_stay_in_half_precision(name):
    x = normal(2, 8, 7, 4).astype(np.float32)
    rounded = jnp.asarray(x, jnp.bfloat16)
    got, expected = (jax.jit(LAYERS[name])(x) for x in (rounded, rounded.astype(jnp.float32)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", REMAT)
def test_networks_in_half_precision_keep_parameters_and_statistics_in_single(name):
    make = REMAT[name]
    net, x = jn.from_linen(make(dtype=jnp.bfloat16)), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params, stats = jax.eval_shape(net.init, jax.random.key(0), x)
    logits, moved = jax.eval_shape(net.train, params, stats, x, jax.random.key(0))
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats, moved))} == {np.dtype(np.float32)}


def test_logits_in_half_precision_are_near_those_in_single():
    x = normal(4, 6, 6, 3).astype(np.float32)
    single, half = (
        jn.from_linen(models.ResNet((1,), BasicBlock, 10, 8, models.cifar_stem, dtype=dtype))
        for dtype in (None, jnp.bfloat16)
    )
    params, stats = jax.jit(single.init)(jax.random.key(0), x)
    expected = np.asarray(jax.jit(single.infer)(params, stats, x))
    got = jax.jit(half.infer)(params, stats, x).astype(jnp.float32)
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())


def test_images_that_are_none_or_too_small():
    """Of nothing a convolution gives nothing; a network says that nothing is left."""
    x, kernel = jnp.ones((2, 3, 3, 1)), jnp.ones((5, 5, 1, 2))
    assert layers.conv_general_dilated(x[:0], kernel, (1, 1), "SAME").shape == (0, 3, 3, 2)
    assert layers.conv_general_dilated(x, kernel, (1, 1), "VALID").shape == (2, 0, 0, 2)
    assert layers.flatten(x[:0]).shape == (0, 9)
    with pytest.raises(ValueError, match=r"nothing is left of the images, \[2, 0, 0, 2\]: they are too small"):
        layers.flatten(jnp.ones((2, 0, 0, 2)))
