"""The published networks: their sizes to the parameter, the maps inside, and what every family can be used for."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import kept

import jaxnets as jn
from jaxnets import models

KEY = jax.random.key(0)
IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(module, image):
    """Shapes of parameters and statistics, nothing allocated."""
    return jax.eval_shape(jn.from_linen(module).init, KEY, jax.ShapeDtypeStruct((1, *image), jnp.float32))


@pytest.mark.parametrize(
    ("make", "image", "expected"),
    [
        (models.AlexNet, IMAGENET, 60_965_224),
        (models.AlexNet.one_column, IMAGENET, 61_100_840),
        (models.ZFNet, IMAGENET, 62_357_608),
        (models.vgg11, IMAGENET, 132_863_336),
        (models.vgg13, IMAGENET, 133_047_848),
        (models.vgg16, IMAGENET, 138_357_544),
        (models.vgg19, IMAGENET, 143_667_240),
        (models.vgg11_bn, IMAGENET, 132_868_840),
        (models.vgg13_bn, IMAGENET, 133_053_736),
        (models.vgg16_bn, IMAGENET, 138_365_992),
        (models.vgg19_bn, IMAGENET, 143_678_248),
        (models.resnet18, IMAGENET, 11_689_512),
        (models.resnet34, IMAGENET, 21_797_672),
        (models.resnet50, IMAGENET, 25_557_032),
        (models.resnet101, IMAGENET, 44_549_160),
        (models.resnet152, IMAGENET, 60_192_808),
        (models.vit_small, IMAGENET, 22_050_664),
        (partial(models.cifar_resnet, 20), CIFAR, 269_722),
        (partial(models.cifar_resnet, 56), CIFAR, 853_018),
        (partial(models.cifar_resnet, 110), CIFAR, 1_727_962),
        (models.preact_resnet18, CIFAR, 11_172_170),
        (models.wide_resnet28_10, CIFAR, 36_479_194),
        (models.wide_resnet34_10, CIFAR, 46_160_474),
        (models.wide_resnet70_16, CIFAR, 266_796_506),
    ],
)
def test_parameter_counts(make, image, expected):
    assert count(shapes(make(), image)[0]) == expected


@pytest.mark.parametrize(
    ("make", "expected", "heads"),
    [(models.GoogLeNet, 6_998_552, 6_379_728), (models.GoogLeNet.with_batch_norm, 6_624_904, 6_379_984)],
)
def test_parameter_counts_of_googlenet(make, expected, heads):
    params, _ = shapes(make(), IMAGENET)
    auxiliary = [params.pop(name) for name in ("aux1", "aux2")]
    assert count(params) == expected
    assert count(auxiliary) == heads


@pytest.mark.parametrize(
    ("make", "sides"),
    [
        (models.AlexNet, {"conv1": 27, "conv2": 13, "conv3": 13, "conv4": 13, "conv5": 6}),
        (models.ZFNet, {"conv1": 55, "conv2": 13, "conv3": 13, "conv4": 13, "conv5": 6}),
        (models.vgg16, {"stage1/conv1_1": 224, "stage1": 112, "stage2": 56, "stage3": 28, "stage4": 14, "stage5": 7}),
        (models.GoogLeNet, {"conv1": 56, "conv3": 28, "inception3b": 28, "inception4a": 14, "inception5b": 7}),
        (models.GoogLeNet.with_batch_norm, {"conv1": 56, "conv3": 28, "inception4e": 14, "inception5a": 7}),
        (models.resnet50, {"conv1": 112, "layer1_0": 56, "layer2_0": 28, "layer3_0": 14, "layer4_2": 7}),
    ],
)
def test_sizes_of_maps(make, sides):
    """Those of the papers' figures and tables."""
    net = jn.from_linen(make())
    image = jax.ShapeDtypeStruct((1, *IMAGENET), jnp.float32)
    logits, _, seen = jax.eval_shape(net.activations, *shapes(make(), IMAGENET), image)
    assert {name: seen[name].shape[1:3] for name in sides} == {name: (side, side) for name, side in sides.items()}
    assert logits.shape == (1, 1000)


def test_auxiliary_heads_see_four_by_four_places():
    seen = jax.eval_shape(
        jn.from_linen(models.GoogLeNet()).activations,
        *shapes(models.GoogLeNet(), IMAGENET),
        jax.ShapeDtypeStruct((1, *IMAGENET), jnp.float32),
    )[2]
    assert seen["aux1/conv"].shape == seen["aux2/conv"].shape == (1, 4, 4, 128)


def test_stem_for_small_images_keeps_their_size():
    net = jn.from_linen(models.resnet18(10, width=4, stem=models.cifar_stem))
    x = jnp.zeros((1, *CIFAR))
    seen = jax.eval_shape(lambda: net.activations(*net.init(KEY, x), x)[2])
    blocks = [seen[f"layer{stage}_{number}"].shape for stage in (1, 2, 3, 4) for number in (0, 1)]
    assert [shape[1] for shape in blocks] == [32, 32, 16, 16, 8, 8, 4, 4]
    assert [shape[3] for shape in blocks] == [4, 4, 8, 8, 16, 16, 32, 32]


def test_plain_network_has_no_shortcut():
    """Where all its convolutions are zero nothing comes through, but for the path past them."""
    x = jax.random.uniform(KEY, (2, *CIFAR))
    for shortcut, passes in ((models.resnet.Padded, True), (models.resnet.NoShortcut, False)):
        net = jn.from_linen(models.cifar_resnet(8, shortcut=shortcut))
        params, stats = jax.jit(net.init)(KEY, x)
        params = {
            name: jax.tree.map(jnp.zeros_like, part) if name.startswith("layer") else part
            for name, part in params.items()
        }
        assert bool(jnp.any(jax.jit(net.activations)(params, stats, x)[2]["layer3_0"] != 0)) == passes


FAMILIES = {
    "perceptron": models.Perceptron,
    "mlp": partial(models.MLP, (16,)),
    "rbf_network": partial(models.RBFNetwork, 8),
    "lenet5": models.LeNet5,
    "lenet5_modern": models.LeNet5.modern,
    "small_cnn": models.SmallCNN,
    "madry_cnn": models.MadryCNN,
    "alexnet": partial(models.AlexNet.small, width=12),
    "zfnet": partial(models.ZFNet.small, width=12),
    "vgg": partial(models.vgg11, 10, width=4, hidden=16, places=1),
    "vgg_bn": partial(models.vgg11_bn, 10, width=4, hidden=16, places=1),
    "googlenet": partial(models.GoogLeNet.small, width=1 / 16),
    "resnet": partial(models.ResNet, (1, 1), models.resnet.BasicBlock, 10, 4, models.cifar_stem),
    "bottleneck": partial(models.ResNet, (1, 1), models.resnet.Bottleneck, 10, 4, models.cifar_stem),
    "preact_resnet": partial(models.PreActResNet, (1, 1), width=4),
    "preact_bottleneck": partial(models.PreActResNet, (1, 1), models.preact_resnet.PreActBottleneck, width=4),
    "wide_resnet": partial(models.WideResNet, 10, 1),
    "vit": partial(models.ViT, patch=8, width=24, depth=2, heads=3, classes=10),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
QUICK = ("perceptron", "mlp", "rbf_network")
every_family_computed = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


def built(name, **settings):
    """With weights near those of the beginning, where some are zero and pass no gradient on."""
    net, random = jn.from_linen(FAMILIES[name](**settings)), np.random.default_rng(0)
    x = random.uniform(size=(4, *CIFAR)).astype(np.float32)
    params, stats = jax.tree.map(np.asarray, jax.jit(net.init)(KEY, x))
    return net, jax.tree.map(lambda leaf: np.float32(leaf + 0.01 * random.normal(size=leaf.shape)), params), stats, x


def equations(program):
    """Of a traced function and of all functions in it."""
    for equation in program.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@every_family
def test_settings_reach_every_layer(name):
    """Of a network in bfloat16 with ``remat``: the same parameters; no product is single, all hidden layers forget."""
    plain, other = (jn.from_linen(FAMILIES[name](**s)) for s in ({}, {"dtype": jnp.bfloat16, "remat": True}))
    x = jax.ShapeDtypeStruct((2, *CIFAR), jnp.float32)
    variables = jax.eval_shape(plain.init, KEY, x)
    assert jax.eval_shape(other.init, KEY, x) == variables
    program = jax.make_jaxpr(other.train)(*variables, x, KEY)
    assert program.out_avals[0].dtype == jnp.bfloat16
    found = list(equations(program.jaxpr))
    products = [one for one in found if one.primitive.name in ("dot_general", "conv_general_dilated")]
    single = [one for one in products if any(operand.aval.dtype != jnp.bfloat16 for operand in one.invars)]
    # But for the distances of radial basis functions, differences of large numbers.
    assert len(single) == (name == "rbf_network") < len(products)
    assert any(one.primitive.name == "remat2" for one in found)


@pytest.mark.parametrize("name", ["lenet5", "lenet5_modern", "madry_cnn"])
def test_forgetting_keeps_less(name):
    """As larger networks, in `test_layers`; dense layers with ReLU keep only their inputs anyway."""
    assert kept(FAMILIES[name](remat=True)) < 0.4 * kept(FAMILIES[name]())


def test_forgetting_keeps_the_inputs_of_layers_alone():
    """Of `SmallCNN`, which keeps little more without: its convolutions stride, and nothing is pooled."""
    image, conv1, conv2, fc1 = 32 * 32 * 3, 16 * 16 * 16, 8 * 8 * 32, 100
    inputs = 4 * 32 * (image + conv1 + conv2 + fc1)
    assert kept(FAMILIES["small_cnn"](remat=True)) <= inputs < 0.6 * kept(FAMILIES["small_cnn"]())


@every_family_computed
def test_forgetting_changes_nothing(name, x64):
    """With ``remat``: the same parameters, values, gradients and statistics. In double precision, for where a network
    normalises four rows of one place it amplifies rounding ten thousandfold."""
    plain, *variables = built(name)
    forgetful, *same = built(name, remat=True)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    params, stats, x = jax.tree.map(np.float64, variables)

    def loss(net, params):
        logits, moved = net.train(params, stats, x, KEY)
        return jnp.sum(logits**2), moved

    (value, moved), gradient = jax.jit(jax.value_and_grad(partial(loss, plain), has_aux=True))(params)
    (again, moved_too), gradient_too = jax.jit(jax.value_and_grad(partial(loss, forgetful), has_aux=True))(params)
    assert value.dtype == np.float64
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(close, (again, gradient_too, moved_too), (value, gradient, moved))


@every_family_computed
def test_half_precision(name):
    """In bfloat16 the parameters stay single, and the logits are those of single precision, roughly."""
    net, params, stats, x = built(name)
    half, same, _, _ = built(name, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    logits, expected, (_, moved) = jax.jit(
        lambda params, stats, x: (
            half.infer(params, stats, x), net.infer(params, stats, x), half.train(params, stats, x, KEY)
        )
    )(params, stats, x)  # fmt: skip
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.05 * float(jnp.abs(expected).max()))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moved))


@every_family_computed
def test_attacked_and_trained(name):
    """An adversarial training step in bfloat16 moves every parameter; attacks raise the loss."""
    net, params, stats, x = built(name, dtype=jnp.bfloat16)
    y = np.arange(4)
    attack = partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=3)

    @jax.jit
    def attacked(params, x):
        x_adv = attack(KEY, net.logits_fn(params, stats), x, y)
        logits = (net.infer(params, stats, z).astype(jnp.float32) for z in (x, x_adv))
        return x_adv, [jn.losses.cross_entropy(z, y).mean() for z in logits]

    x_adv, (before, after) = attacked(params, x)
    assert x_adv.dtype == jnp.float32
    assert after > before
    with_heads = jn.objectives.auxiliary(net) if name == "googlenet" else None
    objective = jn.objectives.adversarial(net, attack, on_attacked=with_heads)
    gradient = jax.jit(jax.grad(objective, has_aux=True))(params, stats, jn.types.Batch(x, y), KEY)[0]
    assert all(np.any(leaf != np.float32(0)) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("width", [27, 6])
def test_wide_network_of_an_impossible_depth(width):
    with pytest.raises(ValueError, match=rf"6 n \+ 4 layers, 10 or more, got depth={width}"):
        shapes(models.WideResNet(width, 1), CIFAR)


def test_other_impossible_wishes():
    with pytest.raises(ValueError, match=r"6 n \+ 2 layers, 8 or more, got layers=21"):
        models.cifar_resnet(21)
    with pytest.raises(ValueError, match="16x16 do not fill an image of 32x40"):
        shapes(models.vit_small(), (32, 40, 3))


# The summary.


def test_summary_of_published_networks():
    """Multiply-adds as counted in the papers and by torchvision, times two."""
    for make, image, expected in (
        (models.resnet18, IMAGENET, 1.814e9),
        (models.resnet50, IMAGENET, 4.089e9),
        (models.vgg16, IMAGENET, 15.470e9),
        (models.AlexNet.one_column, IMAGENET, 0.714e9),
        (models.wide_resnet28_10, CIFAR, 5.245e9),
    ):
        found = models.summary(make(), image)
        assert found.flops == pytest.approx(2 * expected, rel=2e-3)
        assert found.parameters == count(shapes(make(), image)[0])


def test_summary_of_blocks_adds_up():
    for depth in (1, 2, 3):
        found = models.summary(models.ViT(patch=8, width=24, depth=2, heads=3, classes=10), CIFAR, depth)
        top = [layer for layer in found.layers if "/" not in layer.name]
        assert sum(layer.flops for layer in top) == found.flops
        # The class token and the positions belong to no layer.
        assert sum(layer.parameters for layer in top) == found.parameters - 24 - 17 * 24
        assert max(layer.name.count("/") for layer in found.layers) == depth - 1
    attention = next(layer for layer in found.layers if layer.name == "block0/attention")
    assert attention.flops == 4 * 2 * 17 * 24 * 24 + 2 * 2 * 17 * 17 * 24


def test_summary_counts_statistics_and_activations():
    found = models.summary(models.ResNet((1,), models.resnet.BasicBlock, 10, 4, models.cifar_stem), (8, 8, 3))
    assert found.statistics == 3 * 2 * 4
    # Convolution and batch norm of the stem and twice of the block, and the logits; the shortcut gives back its input.
    assert found.activations == 6 * 8 * 8 * 4 + 10
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["layer", "conv1", "bn1", "layer1_0", "fc"]
    assert lines[3].split()[1:] == ["8x8x4", "304", "0.04"]


class Called(nn.Module):
    """A layer, called so many times."""

    layer: nn.Module
    times: int = 1

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.times):
            x = self.layer(x)
        return x


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x), x


@pytest.mark.parametrize(("layer", "image", "products"), [
    (nn.DenseGeneral((3, 8), use_bias=False), (9, 4), 9 * 4 * 24),
    (nn.DenseGeneral((3, 8)), (9, 4), 9 * 4 * 24),
    (nn.DenseGeneral(5, axis=(-2, -1), use_bias=False), (9, 4), 9 * 4 * 5),
    (nn.MultiHeadDotProductAttention(4, use_bias=False), (16, 32), 4 * 16 * 32 * 32 + 2 * 16 * 16 * 32),
    (nn.ConvTranspose(8, (2, 2), strides=(2, 2)), (9, 9, 4), 81 * 4 * 4 * 8),
    (nn.Conv(6, (3, 3), strides=2, feature_group_count=2, use_bias=False), (8, 8, 4), 16 * 9 * 2 * 6),
    (Pair(), (4,), 12),
], ids=["features", "features and bias", "axes", "attention", "transpose", "groups", "pair"])  # fmt: skip
def test_summary_counts_the_products_of_layers(layer, image, products):
    assert models.summary(Called(layer), image).flops == 2 * products
    assert models.summary(nn.Sequential([layer]), image).flops == 2 * products


def test_summary_counts_every_call_and_the_network_itself():
    assert models.summary(Called(nn.Dense(4), times=3), (4,)).flops == 3 * 2 * 16
    assert models.summary(nn.Dense(3), (4,)).flops == 24
