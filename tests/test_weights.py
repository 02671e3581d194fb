"""Networks with the weights of their twins in PyTorch: the same values and gradients; what does not fit is named."""

import importlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxnets as jn
from jaxnets import models, weights
from jaxnets.models import googlenet
from jaxnets.models.layers import BatchNorm, identity
from jaxnets.models.lenet import EuclideanRBF
from jaxnets.models.resnet import BasicBlock, Bottleneck
from jaxnets.weights.reading import read_state

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # more only wait for each other at these sizes
twins = importlib.import_module("tests.torch_networks")
mappings = importlib.import_module("tests.torch_mappings")

# XLA's emitter of fusions takes three quarters of the time that the largest of these programs take to compile.
compiled = partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})

ALEXNET, VGG = {"features": (8, 12, 16, 8, 8), "hidden": 24}, {"width": 4, "hidden": 16}
VIT = {"patch": 4, "width": 24, "depth": 2, "heads": 3}


def drawings():
    """Those of the output of LeNet-5: ``-|x - c|^2 / 2`` grows by ``2 c_i`` from minus to plus the ``i``-th unit."""
    units = np.eye(84, dtype=np.float32)
    ends = [np.asarray(EuclideanRBF().apply({}, end)) for end in (-units, units)]
    return torch.from_numpy((ends[1] - ends[0]).T / 2)


class Module(nn.Module):
    """GoogLeNet with batch norm, cut off after the first module, with an auxiliary head at its end."""

    @nn.compact
    def __call__(self, x, train=False):
        form = googlenet.WITH_BATCH_NORM
        x = googlenet.large_stem(x, 1 / 8, form, train)
        x = googlenet.Inception((8, 12, 16, 2, 4, 4), form.norm, form.kernel, name="inception3a")(x, train)
        return googlenet.AuxiliaryHead(10, 16, 128, form, name="aux")(x, train)


# Ours, the twin, and the image.
NETWORKS = {
    "alexnet one column": (
        lambda: models.AlexNet(10, **ALEXNET, groups=1, norm=identity), lambda: twins.alexnet(**ALEXNET), (224, 224, 3)
    ),
    "alexnet": (
        lambda: models.AlexNet(10, **ALEXNET), lambda: twins.alexnet(**ALEXNET, groups=2, norm=True), (127, 130, 3)
    ),
    "zfnet": (lambda: models.ZFNet(10, **ALEXNET), lambda: twins.zfnet(**ALEXNET), (150, 131, 3)),
    "vgg11": (lambda: models.vgg11(10, **VGG), lambda: twins.vgg((1, 1, 2, 2, 2), **VGG), (64, 32, 3)),
    "vgg with batch norm": (
        lambda: models.VGG((1, 1, 1, 1, 2), 10, BatchNorm, **VGG, places=1),
        lambda: twins.vgg((1, 1, 1, 1, 2), **VGG, places=1, norm=True), (32, 32, 3),
    ),
    "googlenet": (
        lambda: models.GoogLeNet(10, width=1 / 8), lambda: twins.PublishedGoogLeNet(divide=8, places=2), (131, 90, 3)
    ),
    "googlenet with batch norm": (
        lambda: models.GoogLeNet.with_batch_norm(10, width=1 / 8), lambda: twins.GoogLeNet(divide=8), (96, 96, 3)
    ),
    "a module of googlenet with batch norm": (lambda: Module(), lambda: twins.googlenet_module(divide=8), (49, 40, 3)),
    "resnet": (
        lambda: models.ResNet((2, 1, 1), BasicBlock, 10, 4), lambda: twins.ResNet(twins.BasicBlock, (2, 1, 1), width=4),
        (64, 64, 3),
    ),
    "resnet of bottlenecks": (
        lambda: models.ResNet((1, 2), Bottleneck, 10, 8, models.cifar_stem),
        lambda: twins.ResNet(twins.Bottleneck, (1, 2), width=8, small=True), (16, 16, 3),
    ),
    "preact resnet": (
        lambda: models.PreActResNet((1, 2, 1), width=4), lambda: twins.PreActResNet((1, 2, 1), width=4), (16, 16, 3)
    ),
    "wide resnet": (lambda: models.WideResNet(16, 1), lambda: twins.WideResNet(16, 1), (16, 16, 3)),
    "vit": (lambda: models.ViT(10, **VIT), lambda: twins.ViT((3, 12, 8), **VIT), (12, 8, 3)),
    "perceptron": (lambda: models.Perceptron(), lambda: twins.Perceptron(60), (4, 5, 3)),
    "rbf_network": (lambda: models.RBFNetwork(7), lambda: twins.RBFNetwork(24, 7), (4, 3, 2)),
    "mlp": (lambda: models.MLP((20, 15)), lambda: twins.mlp((3, 4, 5), (20, 15)), (4, 5, 3)),
    "small_cnn": (lambda: models.SmallCNN(), lambda: twins.small_cnn(), (28, 28, 1)),
    "madry_cnn": (lambda: models.MadryCNN(), lambda: twins.madry_cnn(), (28, 28, 1)),
    "lenet5": (lambda: models.LeNet5(), lambda: twins.LeNet1998(drawings()), (28, 28, 1)),
    "lenet5_modern": (lambda: models.LeNet5.modern(), lambda: twins.LeNet(), (28, 28, 1)),
}  # fmt: skip

# Where `from_torch` has no names: ``(state_dict, image) -> params``.
MAPPINGS = {
    "vit": partial(mappings.vit, heads=VIT["heads"]),
    "rbf_network": mappings.rbf_network,
    "lenet5": mappings.lenet5,
}


def make(name):
    """Our network, its twin with random weights, the shape of an image, and two images."""
    ours, twin, image = NETWORKS[name]
    x = np.random.default_rng(0).uniform(size=(2, *image)).astype(np.float32)
    return ours(), twins.randomized(twin()), image, x


def channels_first(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def assert_near(got, expected):
    """To 1e-4 of the largest entry of each array."""

    def check(path, a, b):
        name = jax.tree_util.keystr(path)
        # Softmax is the same where all keys are shifted: the gradient of their bias is zero, but for rounding.
        scale = 1.0 if name.endswith("['key']['bias']") else np.abs(b).max() or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-4, rtol=0, err_msg=name)

    jax.tree_util.tree_map_with_path(check, jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, expected))


def from_twin(name, module, image, state):
    return (MAPPINGS[name](state, image), {}) if name in MAPPINGS else weights.from_torch(module, image, state)


def torch_slopes(twin, x, directions):
    """All logits, and the gradients of their sum along ``directions``: of the input, and of the weights by name."""
    x = channels_first(x).requires_grad_()
    out = twin(x)
    logits = out if isinstance(out, tuple) else (out,)
    sum((one * along).sum() for one, along in zip(logits, map(torch.from_numpy, directions), strict=True)).backward()
    slopes = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    return [one.detach() for one in logits], x.grad.permute(0, 2, 3, 1), twin.state_dict() | slopes


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow(name) if name == "googlenet with batch norm" else name for name in NETWORKS])
def test_values_and_gradients_are_those_of_pytorch(name):
    """Those of both auxiliary heads as well."""
    module, twin, image, x = make(name)
    params, stats = from_twin(name, module, image, twin.state_dict())
    net = jn.from_linen(module)
    heads = ("aux1", "aux2") if name in ("googlenet", "googlenet with batch norm") else ()
    directions = np.random.default_rng(1).normal(size=(1 + len(heads), len(x), 10)).astype(np.float32)

    @compiled
    def slopes(params, stats, x):
        def along(params, x):
            if heads:
                logits, _, layers = net.activations(params, stats, x)
                logits = [logits, *(layers[head] for head in heads)]
            else:
                logits = [net.infer(params, stats, x)]
            return sum(jnp.vdot(*pair) for pair in zip(logits, directions, strict=True)), logits

        (_, logits), (of_params, of_x) = jax.value_and_grad(along, (0, 1), has_aux=True)(params, x)
        return logits, of_x, of_params

    logits, of_x, of_params = slopes(params, stats, x)
    expected_logits, expected_of_x, by_name = torch_slopes(twin, x, directions)
    assert_near((logits, of_x), (expected_logits, expected_of_x))
    # Gradients of weights go the way of weights.
    assert_near(of_params, from_twin(name, module, image, by_name)[0])


@pytest.mark.parametrize("name", ["resnet", "preact resnet", "wide resnet"])
def test_a_step_of_batch_norm_is_that_of_pytorch(name):
    module, twin, image, x = make(name)
    params, stats = weights.from_torch(module, image, twin.state_dict())
    logits, moved = compiled(jn.from_linen(module).train)(params, stats, x, jax.random.key(0))
    with torch.no_grad():
        expected = twin.train()(channels_first(x))
    assert_near(logits, expected)
    _, expected_stats = weights.from_torch(module, image, twin.state_dict())
    assert_near(moved, expected_stats)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(stats), strict=True))


PUBLISHED = {
    "alexnet": (lambda: twins.alexnet(1000), 61_100_840),
    "zfnet": (lambda: twins.zfnet(1000), 62_357_608),
    "vgg11": (lambda: twins.vgg((1, 1, 2, 2, 2), 1000), 132_863_336),
    "vgg16_bn": (lambda: twins.vgg((2, 2, 3, 3, 3), 1000, norm=True), 138_365_992),
    "googlenet": (lambda: twins.GoogLeNet(1000), 13_004_888),  # with both heads
    "resnet18": (lambda: twins.ResNet(twins.BasicBlock, (2, 2, 2, 2), 1000), 11_689_512),
    "resnet50": (lambda: twins.ResNet(twins.Bottleneck, (3, 4, 6, 3), 1000), 25_557_032),
    "vit_small": (lambda: twins.ViT((3, 224, 224), 16, 384, 12, 6, 1000), 22_050_664),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_twins_have_as_many_parameters_as_published(name):
    make, expected = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == expected


# Names.


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def renamed(state, *changes):
    for old, new in changes:
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


RESNET = models.ResNet((1, 1), Bottleneck, 10, 4, models.cifar_stem)
IMAGE = (16, 16, 3)


def resnet_state():
    return twins.randomized(twins.ResNet(twins.Bottleneck, (1, 1), width=4, small=True)).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"net": {f"module.{name}": value for name, value in state.items()}, "acc": 0.5},
        lambda state: renamed(state, ("downsample", "shortcut"), ("fc.", "linear.")),
        lambda state: {name: value for name, value in state.items() if "num_batches_tracked" not in name},
        lambda state: {name: value.numpy() for name, value in state.items()},
    ],
    ids=["parallel", "compiled", "checkpoint", "both", "names of others", "old", "arrays"],
)
def test_the_same_weights_in_other_wrappings(wrap, tmp_path):
    state = resnet_state()
    expected = weights.from_torch(RESNET, IMAGE, state)
    assert_same(weights.from_torch(RESNET, IMAGE, wrap(state)), expected)


def test_all_that_does_not_fit_is_named_at_once():
    state = renamed(resnet_state(), ("layer2.0.bn3", "layer2.0.bn4"))
    state["fc.weight"], state["aux.bias"] = state["fc.weight"][:7], torch.zeros(2)
    with pytest.raises(ValueError, match="does not fit") as raised:
        weights.from_torch(RESNET, IMAGE, state)
    missing, left_over, shapes = (line.strip().partition(": ")[2] for line in str(raised.value).splitlines()[1:-1])
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert set(missing.split(", ")) == {f"layer2.0.bn3.{leaf}" for leaf in leaves}
    assert set(left_over.split(", ")) == {"aux.bias", *(f"layer2.0.bn4.{leaf}" for leaf in leaves)}
    assert shapes == "fc.weight is (7, 32), the network takes (10, 32)"


def test_no_layer_takes_the_weights_of_another():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="linear")(nn.Dense(3, name="fc")(x))

    state = {"fc.weight": np.ones((3, 3)), "fc.bias": np.ones(3)}
    with pytest.raises(ValueError, match=r"missing: linear.bias, linear.weight\n"):
        weights.from_torch(Two(), (3,), state)


def test_a_classifier_is_no_module():
    with pytest.raises(TypeError, match=r"must be a module of Flax's Linen, .* got .*Classifier"):
        weights.from_torch(jn.from_linen(RESNET), IMAGE, resnet_state())


def test_heads_that_one_side_lacks_are_named():
    state = twins.GoogLeNet(divide=16).state_dict()
    module = models.GoogLeNet.with_batch_norm(10, width=1 / 16)
    without = {name: value for name, value in state.items() if not name.startswith("aux2")}
    with pytest.raises(ValueError, match=r"missing: (aux2[^,]*, )+aux2[^,]*\nBuild"):
        weights.from_torch(module, (64, 64, 3), without)


def test_chains_of_other_lengths_are_named():
    with pytest.raises(ValueError, match="missing: Dense_2/bias, Dense_2/kernel\n"):
        weights.from_torch(models.MLP((5, 5)), (4,), twins.mlp((1, 2, 2), (5,)).state_dict())
    with pytest.raises(ValueError, match=r"left over: 5.weight, 5.bias"):
        weights.from_torch(models.MLP((5,)), (4,), twins.mlp((1, 2, 2), (5, 10)).state_dict())


def test_layers_of_a_chain_are_in_the_order_of_their_numbers(tmp_path):
    """Equal layers, more than ten of them: by letters ``10.weight`` comes before ``2.weight``, and shapes fit."""
    twin, module = twins.randomized(twins.mlp((1, 1, 6), (6,) * 12, 6)), models.MLP((6,) * 12, 6)
    state = twin.state_dict()
    expected = weights.from_torch(module, (1, 6, 1), state)
    assert_same(weights.from_torch(module, (1, 6, 1), dict(sorted(state.items()))), expected)
    file = tmp_path / "chain.safetensors"
    safetensors.numpy.save_file({name: value.numpy() for name, value in state.items()}, file)
    assert_same(weights.from_torch(module, (1, 6, 1), file), expected)


def test_a_file_without_order_is_no_chain_by_names_that_tell_none(tmp_path):
    state = {
        f"{name}.{leaf}": value
        for name in ("inside", "again", "out")
        for leaf, value in (("weight", np.ones((4, 4), np.float32)), ("bias", np.ones(4, np.float32)))
    }
    module = models.MLP((4, 4), 4)
    params, _ = weights.from_torch(module, (4,), state)
    assert len(params) == 3
    safetensors.numpy.save_file(state, tmp_path / "chain.safetensors")
    with pytest.raises(ValueError, match="does not tell the order of its layers"):
        weights.from_torch(module, (4,), tmp_path / "chain.safetensors")


class Chain(nn.Module):
    """A network of one's own, whose dense layer comes after dropout and pooling."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.max_pool(nn.Conv(3, (3, 3), name="see")(x), (2, 2), strides=(2, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10, name="say")(x)


def test_a_chain_of_ones_own_by_order():
    twin = twins.randomized(
        torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(18, 10)
        )
    )  # fmt: skip
    x = np.random.default_rng(0).uniform(size=(2, 4, 6, 2)).astype(np.float32)
    params, stats = weights.from_torch(Chain(), x.shape[1:], twin.state_dict(), pair=weights.by_order)
    logits = jn.from_linen(Chain()).infer(params, stats, x)
    assert_near(logits, twin(channels_first(x)).detach())
    with pytest.raises(ValueError, match=r"missing: say\.bias, .*see\.weight\n  left over: 0\.weight"):
        weights.from_torch(Chain(), x.shape[1:], twin.state_dict())


def test_weights_are_copies_in_the_precision_of_the_network():
    twin = twins.randomized(twins.mlp((1, 2, 2), (5,)))
    module = models.MLP((5,))
    params, _ = weights.from_torch(module, (2, 2, 1), twin.state_dict())
    before = jax.tree.map(np.copy, params)
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    assert_same(params, before)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        state = {name: value.to(dtype) for name, value in twins.randomized(twin).state_dict().items()}
        half, _ = weights.from_torch(module, (2, 2, 1), state)
        assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(half["Dense_0"]["bias"], state["1.bias"].float())
    bfloat16 = {name: value.numpy().astype(jnp.bfloat16) for name, value in twin.state_dict().items()}
    half, _ = weights.from_torch(module, (2, 2, 1), bfloat16)
    np.testing.assert_array_equal(half["Dense_0"]["bias"], bfloat16["1.bias"].astype(np.float32))


def test_layers_that_are_never_called_are_left_out_below_wrappers_too():
    names = ("conv1.weight", "bn1.num_batches_tracked", "sub_block1.layer.0.bn1.weight")
    for wrapper in ("", "module.", "_orig_mod.module."):
        assert list(read_state({wrapper + name: np.ones(1) for name in names})) == ["conv1.weight"]
