"""Layers against JAX's and Flax's own, with all their derivatives; the models' sizes, and their gradients."""

import inspect
import re
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxnets as jn
from jaxnets import cpu
from jaxnets.models import layers, lenet
from jaxnets.models.layers import units

CONVOLUTIONS = {
    "plain": {"window_strides": (1, 1), "padding": "VALID"},
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "four pixels": {"window_strides": (1, 1), "padding": [(1, 0), (2, 1)]},
    "stride": {"window_strides": (2, 2), "padding": [(1, 1), (1, 1)]},
    "edges wider than the kernel": {"window_strides": (2, 3), "padding": [(5, 4), (4, 1)]},
    "uneven": {"window_strides": (2, 1), "padding": [(0, 2), (1, 0)]},
    "stride same": {"window_strides": (3, 2), "padding": "SAME"},
    "dilated": {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (2, 1)},
    "groups": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 3},
    "transposed": {"window_strides": (1, 1), "padding": [(2, 2), (2, 2)], "lhs_dilation": (2, 2)},
}
every_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def operands(name, dtype, channels=3):
    random = np.random.default_rng(0)
    groups = CONVOLUTIONS[name].get("feature_group_count", 1)
    shapes = (2, 7, 6, channels), (3, 2, channels // groups, 6)
    return [random.normal(size=shape).astype(dtype) for _ in range(2) for shape in shapes]


def ours(name):
    return partial(layers.conv_general_dilated, **CONVOLUTIONS[name])


lax_convolution = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def theirs(name):
    return partial(lax_convolution, **CONVOLUTIONS[name])


@pytest.fixture(params=["xla", "onednn"])
def library(request, monkeypatch):
    """Whose convolutions the layers are written for, and single precision is compiled to."""
    if request.param == "onednn" and not cpu._registered:
        pytest.skip("not known to work here")
    monkeypatch.setattr(cpu, "by_onednn", lambda dtype: request.param == "onednn")
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def derivatives(convolve):
    """Everything that is compared, of one convolution, as one compiled function."""

    def loss(x, k):
        return jnp.sum(jnp.sin(convolve(x, k)))

    def stack(a):
        return jnp.stack([a, 2 * a - 1])

    def everything(x, k, x_dot, k_dot):
        return {
            "value": convolve(x, k),
            "gradients": jax.grad(loss, (0, 1))(x, k),
            "gradient of the input alone": jax.grad(loss, 0)(x, k),
            "gradient of the kernel alone": jax.grad(loss, 1)(x, k),
            "jvp": jax.jvp(convolve, (x, k), (x_dot, k_dot)),
            "jvp of the input": jax.jvp(lambda x: convolve(x, k), (x,), (x_dot,)),
            "Hessian-vector product": jax.jvp(jax.grad(loss, (0, 1)), (x, k), (x_dot, k_dot)),
            "Hessian-vector product, reversed": jax.grad(
                lambda x, k: sum(
                    jnp.vdot(a, b) for a, b in zip(jax.grad(loss, (0, 1))(x, k), (x_dot, k_dot), strict=True)
                ),
                (0, 1),
            )(x, k),
            "vmap of inputs": jax.vmap(convolve, (0, None))(stack(x), k),
            "vmap of kernels": jax.vmap(convolve, (None, 0))(x, stack(k)),
            "vmap of both": jax.vmap(convolve)(stack(x), stack(k)),
            "vmapped gradients": jax.vmap(jax.grad(loss, (0, 1)))(stack(x), stack(k)),
            "gradients for each kernel": jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(x, stack(k)),
        }

    return jax.jit(everything)


@pytest.mark.parametrize("channels", [3, 6, 30])
@every_convolution
def test_convolution_and_its_derivatives(name, channels, x64, library, monkeypatch):
    """A CPU computes with few channels in ways of their own."""
    # Which has no double precision.
    monkeypatch.setattr(cpu, "_suits", lambda *_, **__: False)
    arguments = operands(name, np.float64, channels)
    got, expected = (derivatives(f(name))(*arguments) for f in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), got, expected)


@every_convolution
def test_convolution_in_single_precision(name, library):
    x, k, *_ = operands(name, np.float32)

    def value_and_gradients(convolve):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(convolve(x, k))), (0, 1)))(x, k)

    got, expected = value_and_gradients(ours(name)), value_and_gradients(theirs(name))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


def test_flax_convolution_by_ours_is_its_own():
    x = jnp.asarray(operands("plain", np.float32)[0])
    for settings_ in ({"padding": "CIRCULAR"}, {"padding": 1, "strides": 2}, {"kernel_dilation": 2}):
        module = nn.Conv(4, (3, 3), **settings_)
        variables = module.init(jax.random.key(0), x)
        np.testing.assert_allclose(
            layers.Conv(4, (3, 3), **settings_).apply(variables, x), module.apply(variables, x), rtol=1e-5, atol=1e-5
        )


def compiled_loop(convolve, argnum):
    """The program of a loop whose body takes one gradient of a convolution."""
    x, k = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 16, 16))

    def body(_, carry):
        slope = jax.grad(lambda *operands: jnp.sum(convolve(*operands) ** 2), argnum)(*carry)
        return tuple(a - 1e-3 * slope if place == argnum else a for place, a in enumerate(carry))

    return jax.jit(lambda x, k: lax.fori_loop(0, 5, body, (x, k))).lower(x, k).compile().as_text()


FAST = {"b01f_01io->b01f"}


def labels(text):
    """The forms of a program's convolutions."""
    return {line.split("dim_labels=")[1].split(",")[0] for line in text.splitlines() if "dim_labels=" in line}


def convolutions_by_onednn(text):
    """How many there are, where there are no others."""
    assert not labels(text)
    return text.count('custom_call_target="__onednn$convolution"')


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fact of the CPU backend")
@pytest.mark.parametrize("argnum", [0, 1], ids=["input", "kernel"])
def test_gradients_in_loops_are_in_the_form_that_cpus_are_fast_in(argnum, library):
    if library == "onednn":
        assert convolutions_by_onednn(compiled_loop(ours("same"), argnum)) == 2
        return
    assert "01oi" not in compiled_loop(ours("same"), argnum)
    assert labels(compiled_loop(ours("same"), argnum)) == FAST
    assert not labels(compiled_loop(theirs("same"), argnum)) <= FAST, "XLA no longer needs help"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others convolve with strides themselves")
@pytest.mark.parametrize(("window", "edge", "computed"), [(3, 1, "8x8x8x64"), (1, 0, "8x8x8x16")])
def test_gradients_through_a_stride_compute_nothing_but_pixels(window, edge, computed):
    """Blocks of 2x2 pixels as channels, none of them beyond the image; the pixels alone that a 1x1 kernel is at."""
    random = np.random.default_rng(0)
    x, k, cotangent = (
        jnp.asarray(random.normal(size=size), jnp.float32)
        for size in ((8, 16, 16, 16), (window, window, 16, 32), (8, 8, 8, 32))
    )
    settings_ = {"window_strides": (2, 2), "padding": [(edge, edge)] * 2}

    def pull(convolve):
        return jax.jit(lambda c: jax.vjp(lambda x: convolve(x, k, **settings_), x)[1](c)[0])

    ours_, theirs_ = map(pull, (layers.conv_general_dilated, lax_convolution))
    np.testing.assert_allclose(ours_(cotangent), theirs_(cotangent), rtol=1e-4, atol=1e-4)
    assert re.findall(r"stablehlo.convolution.*-> tensor<(\S+)xf32>", ours_.lower(cotangent).as_text()) == [computed]


def pulled(name, x):
    """What a convolution pulls back to inputs of this shape, by lax and by ours: functions of cotangent and kernel."""
    settings_ = dict(CONVOLUTIONS[name])
    if isinstance(settings_["padding"], str):
        settings_["padding"] = lax.padtype_to_pads(
            x.shape[1:3], (3, 2), settings_["window_strides"], settings_["padding"]
        )
    by_lax = lambda c, k: jax.vjp(lambda x: theirs(name)(x, k), x)[1](c)[0]  # noqa: E731
    return by_lax, lambda c, k: layers.convolution.pulled_back(c, x.shape[1:], k, **settings_)


@pytest.mark.parametrize("name", ["plain", "same", "stride", "uneven", "stride same"])
def test_what_is_pulled_back_and_its_gradients(name, x64):
    x, k, direction, _ = operands(name, np.float64)
    cotangent = np.random.default_rng(2).normal(size=theirs(name)(x, k).shape)

    def value_and_gradients(pull):
        value, further = jax.vjp(pull, cotangent, k)
        return value, further(direction)

    expected, got = (jax.jit(partial(value_and_gradients, pull))() for pull in pulled(name, x))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), got, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fact of the CPU backend")
@pytest.mark.parametrize("argnum", [0, 1], ids=["cotangent", "kernel"])
def test_gradients_of_what_is_pulled_back_are_in_the_fast_form_too(argnum, library):
    _, pull = pulled("plain", jnp.ones((4, 10, 10, 16)))
    if library == "onednn":
        assert convolutions_by_onednn(compiled_loop(pull, argnum)) == 2
        return
    assert labels(compiled_loop(pull, argnum)) == FAST


# Dense layers.


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_dense_products_and_their_derivatives(shape, x64):
    random = np.random.default_rng(0)
    x, k, x_dot, k_dot = (random.normal(size=size) for _ in range(2) for size in (shape, (4, 6)))
    numbers = (((len(shape) - 1,), (0,)), ((), ()))
    got, expected = (
        derivatives(lambda x, k, multiply=multiply: multiply(x, k, numbers, precision="highest"))(x, k, x_dot, k_dot)
        for multiply in (layers.dot_general, lax.dot_general)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, expected)


@pytest.mark.parametrize("dimensions", [((2,), (1,)), ((1,), (0,))])
def test_other_products_are_those_of_jax(dimensions):
    x, k = jnp.arange(24.0).reshape(2, 4, 3), jnp.arange(12.0).reshape(4, 3)
    numbers = (dimensions, ((), ()))
    np.testing.assert_array_equal(layers.dot_general(x, k, numbers), lax.dot_general(x, k, numbers))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fact of the CPU backend")
def test_the_input_gradient_of_a_dense_layer_reads_the_kernel_row_by_row():
    def columns_read(dense):
        """The dimensions of the right operand over which the products of a loop with a gradient sum."""
        net = jn.from_linen(dense(64))
        x = jnp.ones((8, 32))
        params, stats = net.init(jax.random.key(0), x)
        slope = jax.grad(lambda x, params: jnp.sum(net.logits_fn(params, stats)(x) ** 2))
        program = jax.jit(lambda x, params: lax.fori_loop(0, 5, lambda _, x: x - slope(x, params), x))
        text = program.lower(x, params).compile().as_text()
        return {line.split("rhs_contracting_dims=")[1][:3] for line in text.splitlines() if " dot(" in line}

    assert columns_read(layers.Dense) == {"{0}"}
    assert "{1}" in columns_read(nn.Dense), "XLA no longer needs help"


# Pooling.


def pool_input(height, width, dtype=np.float64):
    """All entries differ: no ties."""
    random = np.random.default_rng(0)
    values = np.linspace(-1, 1, 2 * height * width * 3)
    return random.permutation(values).reshape(2, height, width, 3).astype(dtype)


@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 1)])
@pytest.mark.parametrize("size", [(6, 4), (7, 5)])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_pooling_and_its_derivatives(name, size, window, x64):
    x = pool_input(*size)
    x_dot = np.random.default_rng(1).normal(size=x.shape)

    def everything(pool):
        def loss(x):
            return jnp.sum(jnp.sin(3 * pool(x)))

        return jax.jit(
            lambda x: (
                pool(x),
                jax.grad(loss)(x),
                jax.jvp(pool, (x,), (x_dot,)),
                jax.jvp(jax.grad(loss), (x,), (x_dot,)),
                jax.vmap(pool)(jnp.stack([x, -x])),
            )
        )(x)

    got = everything(lambda x: getattr(layers, name)(x, window))
    expected = everything(lambda x: getattr(nn, name)(x, window, strides=window))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, expected)


def test_the_first_of_equals_takes_the_gradient_of_max_pool():
    x = jnp.array([[0.0, 1.0], [1.0, 1.0]]).reshape(1, 2, 2, 1)
    for pool in (layers.max_pool, lambda x: nn.max_pool(x, (2, 2), strides=(2, 2))):
        gradient = jax.grad(lambda x: pool(x).sum())(x)  # noqa: B023
        np.testing.assert_array_equal(gradient.reshape(2, 2), [[0, 1], [0, 0]])


def test_max_pool_of_nan_is_nan():
    x = jnp.ones((4, 2, 2, 1)).at[jnp.arange(4), jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])].set(jnp.nan)
    assert jnp.isnan(layers.max_pool(x)).all()


def test_compiled_gradient_through_normalisation_and_max_pool():
    """Normalisation may be computed once for the maximum and once for its gradient, rounded differently."""
    random = np.random.default_rng(0)
    x, weights = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((32, 8, 8, 4), (32, 4, 4, 4)))

    def slope(pool):
        def loss(scale, shift):
            normal = (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1, 2)) + 1e-5)
            return jnp.sum(weights * pool(nn.relu(normal * scale + shift)))

        return jax.jit(jax.grad(loss, (0, 1)))(jnp.linspace(0.7, 1.3, 4), jnp.linspace(-0.1, 0.2, 4))

    expected = slope(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
    np.testing.assert_allclose(slope(layers.max_pool), expected, rtol=1e-4, atol=1e-4)


def test_a_window_larger_than_the_image_raises():
    with pytest.raises(ValueError, match="1x4 holds no pooling window of 2x2"):
        layers.max_pool(jnp.zeros((1, 1, 4, 1)))


# Models.

MODELS = {
    "Perceptron": (jn.models.Perceptron(), 784 * 10 + 10),
    "RBFNetwork": (jn.models.RBFNetwork(30), 30 * 784 + 30 + 30 * 10 + 10),
    "LeNet5": (lenet.LeNet5(), 60_000),
    "LeNet5.modern": (lenet.LeNet5.modern(), 61_706),
    "SmallCNN": (jn.models.SmallCNN(), 166_406),
    "MadryCNN": (jn.models.MadryCNN(), 3_274_634),
    "MLP": (jn.models.MLP((20,)), 784 * 20 + 20 + 20 * 10 + 10),
}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    module, expected = MODELS[name]
    net = jn.from_linen(module)
    params, stats = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
    assert count(params) == expected
    assert count(stats) == 0
    assert jax.eval_shape(net.infer, params, stats, jnp.zeros((3, 28, 28, 1))).shape == (3, 10)


def test_sparse_layer_is_the_table_of_the_paper():
    x = jnp.zeros((1, 14, 14, 6))
    module = lenet.SparseC3()
    params = module.init(jax.random.key(0), x)["params"]
    assert count(params) == 1516
    # A change of map i reaches exactly the outputs that see it.
    reached = np.array(
        [np.abs(module.apply({"params": params}, x.at[..., i].set(1.0))).max(axis=(0, 1, 2)) > 0 for i in range(6)]
    )
    np.testing.assert_array_equal(reached, [[i in seen for seen in lenet._C3_SEES] for i in range(6)])
    assert [len(seen) for seen in lenet._C3_SEES] == [3] * 6 + [4] * 9 + [6]
    # Every map is seen equally often.
    assert {sum(i in seen for seen in lenet._C3_SEES) for i in range(6)} == {10}


def test_output_of_lenet_is_half_the_squared_distance():
    def output(x):
        return lenet.EuclideanRBF().apply({}, x)

    # At 0 the slope of -|x - c|^2 / 2 is c.
    drawings = jax.jacrev(lambda x: output(x[None])[0])(jnp.zeros(84))
    assert set(np.unique(drawings)) == {-1.0, 1.0}
    assert len(np.unique(drawings, axis=0)) == 10
    x = jax.random.normal(jax.random.key(0), (3, 84))
    np.testing.assert_allclose(output(x), -0.5 * ((x[:, None] - drawings) ** 2).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(output(drawings).argmax(axis=1), range(10))


@pytest.mark.parametrize("side", [27, 31])
def test_lenet_takes_no_small_images(side):
    with pytest.raises(ValueError, match=f"got {side}x{side}"):
        lenet.LeNet5().init(jax.random.key(0), jnp.zeros((1, side, side, 1)))


def test_initial_values_as_published():
    params = jn.models.MadryCNN().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    for layer in params.values():
        np.testing.assert_allclose(layer["bias"], 0.1, rtol=1e-6)
        kernel = np.asarray(layer["kernel"])
        assert np.abs(kernel).max() <= 0.2 / 0.87962566 + 1e-6
    assert abs(np.std(params["Dense_0"]["kernel"]) - 0.1) < 0.02


# Gradients of whole networks, small, in double precision.

SMALL = {
    "LeNet5": (lenet.LeNet5(), (2, 28, 28, 1)),
    "LeNet5.modern": (lenet.LeNet5.modern(), (2, 28, 28, 1)),
    "SmallCNN": (jn.models.SmallCNN(), (2, 8, 8, 1)),
    "MadryCNN": (jn.models.MadryCNN(), (1, 4, 4, 1)),
    "MLP": (jn.models.MLP((20, 10)), (2, 5)),
}


@cache
def loss_and_slope(name):
    """``(t, slope at t)`` of the loss along a line in parameters and input, compiled once a model."""
    module, shape = SMALL[name]
    net = jn.from_linen(module)
    params, stats = jax.jit(net.init)(jax.random.key(0), jnp.zeros(shape))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    random = np.random.default_rng(0)
    x = random.uniform(0.2, 0.8, size=shape)
    y = random.integers(0, 10, shape[0])

    def loss(params, x):
        return jnp.sum(jn.losses.cross_entropy(net.infer(params, stats, x), y))

    def along(params_dot, x_dot, t):
        point = jax.tree.map(lambda a, d: a + t * d, (params, x), (params_dot, x_dot))
        value, gradient = jax.value_and_grad(loss, (0, 1))(*point)
        slopes = jax.tree.map(jnp.vdot, gradient, (params_dot, x_dot))
        return value, sum(jax.tree.leaves(slopes))

    return jax.jit(along), params, x


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_directional_derivatives_of_models(name, seed):
    with jax.enable_x64(True):
        along, params, x = loss_and_slope(name)
        random = np.random.default_rng(seed)
        # One leaf at a time has a direction of its own size, so that none hides behind another.
        directions = jax.tree.map(lambda leaf: random.normal(size=leaf.shape) / np.sqrt(leaf.size), (params, x))
        h = 1e-6
        (ahead, _), (value, slope), (behind, _) = (along(*directions, np.float64(t)) for t in (h, 0.0, -h))
        if abs(ahead + behind - 2 * value) < 1e-9 * (1 + abs(value)):  # no unit switched on the way
            np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=2e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-1)


# Activations by name, and precision.

LAYERS = {
    "Perceptron": (jn.models.Perceptron, ["Dense_0"], {"output": (10,)}),
    "MLP": (partial(jn.models.MLP, (7, 6)), ["Dense_0", "Dense_1", "Dense_2"], {"hidden1": (7,), "hidden2": (6,)}),
    "RBFNetwork": (partial(jn.models.RBFNetwork, 5), ["Dense_0", "RadialBasis_0"], {"hidden": (5,)}),
    "LeNet5": (
        jn.models.LeNet5,
        ["Conv_0", "Dense_0", "Dense_1", "SparseC3_0", "Subsampling_0", "Subsampling_1"],
        # The paper's figure 2.
        {
            "c1": (28, 28, 6), "s2": (14, 14, 6), "c3": (10, 10, 16), "s4": (5, 5, 16),
            "c5": (120,), "f6": (84,), "output": (10,),
        },
    ),
    "LeNet5.modern": (
        jn.models.LeNet5.modern,
        ["Conv_0", "Conv_1", "Dense_0", "Dense_1", "Dense_2"],
        {
            "c1": (28, 28, 6), "s2": (14, 14, 6), "c3": (10, 10, 16), "s4": (5, 5, 16),
            "c5": (120,), "f6": (84,), "output": (10,),
        },
    ),
    "SmallCNN": (
        jn.models.SmallCNN,
        ["Conv_0", "Conv_1", "Dense_0", "Dense_1"],
        {"conv1": (14, 14, 16), "conv2": (7, 7, 32), "fc1": (100,)},
    ),
    "MadryCNN": (
        jn.models.MadryCNN,
        ["Conv_0", "Conv_1", "Dense_0", "Dense_1"],
        {"conv1": (28, 28, 32), "pool1": (14, 14, 32), "conv2": (14, 14, 64), "pool2": (7, 7, 64), "fc1": (1024,)},
    ),
}  # fmt: skip
every_small_network = pytest.mark.parametrize("name", LAYERS)


@every_small_network
def test_names_of_parameters_and_activations(name):
    """Saved weights go by the former; the latter are the same with ``remat``, and in the computation's precision."""
    make, owners, expected = LAYERS[name]
    x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    nets = [jn.from_linen(make(**s)) for s in ({}, {"remat": True, "dtype": jnp.bfloat16})]
    variables = jax.eval_shape(nets[0].init, jax.random.key(0), x)
    assert sorted(variables[0]) == owners
    plain, half = (jax.eval_shape(net.activations, *variables, x)[2] for net in nets)
    layers_of_its_own = {path.split("/")[0] for path in plain if path[0].isupper()}
    assert layers_of_its_own - {"EuclideanRBF_0"} == set(owners)
    assert {path: one.shape[1:] for path, one in plain.items() if path not in layers_of_its_own} == expected
    assert {path: one.shape for path, one in half.items()} == {path: one.shape for path, one in plain.items()}
    assert {one.dtype for one in plain.values()} == {np.dtype(np.float32)}
    assert {one.dtype for one in half.values()} == {np.dtype(jnp.bfloat16)}


def seen_in(module, image, rows=3):
    """Logits, activations and parameters, of random ones."""
    net, random = jn.from_linen(module), np.random.default_rng(0)
    x = random.normal(size=(rows, *image)).astype(np.float32)
    shapes, stats = jax.eval_shape(net.init, jax.random.key(1), x)
    scaled = lambda leaf: np.float32(random.normal(size=leaf.shape) / np.sqrt(leaf.size // leaf.shape[-1]))  # noqa: E731
    params = jax.tree.map(scaled, shapes)
    logits, _, seen = jax.tree.map(np.asarray, jax.jit(net.activations)(params, stats, x))
    return logits, seen, params


def test_activations_of_an_mlp_are_after_relu():
    logits, seen, params = seen_in(jn.models.MLP((7, 6)), (5,))
    for below, above, dense in (("hidden1", "hidden2", "Dense_1"), ("hidden2", None, "Dense_2")):
        sums = seen[below] @ params[dense]["kernel"] + params[dense]["bias"]
        np.testing.assert_allclose(np.maximum(sums, 0) if above else sums, seen[above] if above else logits, atol=1e-5)
    assert 0 < (seen["hidden1"] == 0).mean() < 1


def test_activations_of_lenet_are_the_states_of_its_units():
    """After the squashing function: what the layer above computes with."""
    logits, seen, params = seen_in(lenet.LeNet5(), (28, 28, 1), rows=1)
    sums = ["Conv_0", "Subsampling_0", "SparseC3_0", "Subsampling_1", "Dense_0", "Dense_1"]
    for state, layer in zip(("c1", "s2", "c3", "s4", "c5", "f6"), sums, strict=True):
        np.testing.assert_allclose(seen[state], 1.7159 * np.tanh(2 / 3 * seen[layer]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen["output"], logits)
    c5 = seen["s4"].reshape(1, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(seen["Dense_0"], c5, rtol=1e-4, atol=1e-5)


def test_activations_of_madrys_network_before_and_after_pooling():
    _, seen, params = seen_in(jn.models.MadryCNN(), (8, 8, 1), rows=2)
    for number in (1, 2):
        rectified = seen[f"conv{number}"]
        np.testing.assert_array_equal(rectified, np.maximum(seen[f"Conv_{number - 1}"], 0))
        windows = rectified.reshape(2, rectified.shape[1] // 2, 2, rectified.shape[2] // 2, 2, -1)
        np.testing.assert_array_equal(seen[f"pool{number}"], windows.max(axis=(2, 4)))
    fc1 = seen["pool2"].reshape(2, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(seen["fc1"], np.maximum(fc1, 0), atol=1e-4)


# Radial basis functions.


@pytest.mark.parametrize("offset", [0, 0.5, 1000])
def test_squared_distances_in_single_precision(offset):
    """Errors of 2e-6 of typical distances, as of sums of squared differences, however far away zero is."""
    random = np.random.default_rng(0)
    centers = (random.uniform(size=(30, 3072)) + offset).astype(np.float32)
    near = centers[:10] + 8 / 255 * np.sign(random.normal(size=(10, 3072)))
    x = np.concatenate([centers[:10], near, random.uniform(size=(10, 3072)) + offset]).astype(np.float32)
    wide, wide_centers = x.astype(np.float64), centers.astype(np.float64)
    expected = np.stack([((row - wide_centers) ** 2).sum(axis=1) for row in wide])
    direction = random.normal(size=expected.shape).astype(np.float32).astype(np.float64)
    got, pull = jax.vjp(units.squared_distances, x, centers)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * 3072 / 6)
    assert (got >= 0).all()
    of_x = 2 * (direction.sum(axis=1, keepdims=True) * wide - direction @ wide_centers)
    of_centers = 2 * (direction.sum(axis=0)[:, None] * wide_centers - direction.T @ wide)
    # A distance that is rounded to zero passes no gradient on; it is of a row at its centre, and has none.
    for slope, true in zip(pull(jnp.float32(direction)), (of_x, of_centers), strict=True):
        np.testing.assert_allclose(slope, true, rtol=0, atol=1e-5 * np.abs(true).max())


def test_radial_basis_holds_no_row_for_each_centre():
    """A training step's program has no array of rows times centres times inputs."""
    net, x = jn.from_linen(jn.models.RBFNetwork(40)), jax.ShapeDtypeStruct((50, 300), jnp.float32)
    params, stats = jax.eval_shape(net.init, jax.random.key(0), x)
    slope = jax.grad(lambda params, x: net.infer(params, stats, x).sum(), (0, 1))
    program = jax.jit(slope).lower(params, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 50 * 40 * 300 * 4 / 4


@pytest.mark.parametrize("inputs", [12, 3072])
def test_width_of_radial_basis_is_half_the_distance_of_centres(inputs):
    module = layers.RadialBasis(20, nn.initializers.uniform(1.0))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, inputs)))["params"]
    centers = np.asarray(params["centers"], np.float64)
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(centers) for b in centers[:i]]
    np.testing.assert_allclose(np.exp(params["log_width"]), np.sqrt(np.mean(pairs)) / 2, rtol=1e-4)
    # So no image of the box is out of every bump's reach, nor is all of it in one bump.
    images = np.random.default_rng(0).uniform(size=(10, inputs)) ** 3
    reached = np.asarray(module.apply({"params": params}, images.astype(np.float32)))
    assert reached.max(axis=1).min() > 0.05
    assert reached.mean() < 0.6


def test_a_single_centre_needs_a_width():
    with pytest.raises(ValueError, match="single centre has no distance to others"):
        jax.eval_shape(layers.RadialBasis(1).init, jax.random.key(0), jnp.zeros((1, 3)))
    jax.eval_shape(layers.RadialBasis(1, width=2.0).init, jax.random.key(0), jnp.zeros((1, 3)))


# From Flax to pure functions.


class Noisy(nn.Module):
    """Takes Flax's argument ``deterministic``."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(6)(x))


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))


@pytest.mark.parametrize("module", [Noisy(), Trained()], ids=["deterministic", "train"])
def test_dropout_is_on_in_training_alone(module):
    assert {"deterministic", "train"} & set(inspect.signature(type(module).__call__).parameters)
    net, x = jn.from_linen(module), jnp.ones((4, 3))
    params, stats = net.init(jax.random.key(0), x)
    assert stats == {}
    sure = net.infer(params, stats, x)
    np.testing.assert_array_equal(sure, net.logits_fn(params, stats)(x))
    one, two, again = (net.train(params, stats, x, jax.random.key(seed))[0] for seed in (1, 2, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != two).any()
    dropped = np.asarray(one) == 0
    assert 0 < dropped.sum() < dropped.size
    np.testing.assert_allclose(np.asarray(one)[~dropped], 2 * np.asarray(sure)[~dropped], rtol=1e-6)


def test_what_modules_sow_is_an_activation():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "doubled", 2 * x)
            return 3 * x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="block")(x)

    seen = jn.from_linen(Net()).activations({}, {}, np.ones((1, 2)))[2]
    assert sorted(seen) == ["block", "block/doubled"]
    np.testing.assert_array_equal(seen["block/doubled"], [[2, 2]])


def test_a_classifier_without_parameters():
    class Nothing(nn.Module):
        def __call__(self, x):
            return x

    net = jn.from_linen(Nothing())
    assert net.init(jax.random.key(0), jnp.ones((2, 3))) == ({}, {})
    np.testing.assert_array_equal(net.infer({}, {}, jnp.ones((2, 3))), jnp.ones((2, 3)))
