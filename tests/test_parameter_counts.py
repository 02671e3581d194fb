"""Parameters and activations counted by hand, layer by layer, beside the papers' numbers; nothing is allocated."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxnets as jn
from jaxnets import models
from jaxnets.models.resnet import BasicBlock, NoShortcut

IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)


def counted(module, image):
    """What the network itself has: parameters, and those of them that are batch norm's."""
    net, x = jn.from_linen(module), jax.ShapeDtypeStruct((1, *image), jnp.float32)
    params, stats = jax.eval_shape(net.init, jax.random.key(0), x)
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, stats))


# Residual networks by formula. A convolution is (side of the kernel, inputs, outputs).


def convolutions(stages, width, bottleneck):
    """On the main path, and beside it those of the blocks that change the number of features; then that number."""
    main, beside, inputs = [], [], width
    for stage, blocks in enumerate(stages):
        inner = width * 2**stage
        outputs = 4 * inner if bottleneck else inner
        for _ in range(blocks):
            first = [(1, inputs, inner)] if bottleneck else []
            last = (1, inner, outputs) if bottleneck else (3, inner, inner)
            main += [*first, (3, inner if bottleneck else inputs, inner), last]
            beside += [(1, inputs, outputs)] if inputs != outputs else []
            inputs = outputs
    return main, beside, inputs


def weights(layers):
    return sum(side**2 * inputs * outputs for side, inputs, outputs in layers)


def after(layers):
    """Scale and bias of a batch norm after each convolution."""
    return sum(2 * outputs for _, _, outputs in layers)


def before(layers):
    return sum(2 * inputs for _, inputs, _ in layers)


def resnet(stages, width, bottleneck, classes, stem, projections=True):
    """Each convolution with a batch norm after it: all parameters, and those of batch norm."""
    main, beside, end = convolutions(stages, width, bottleneck)
    layers = [(stem, 3, width), *main, *(beside if projections else [])]
    return weights(layers) + after(layers) + (end + 1) * classes, after(layers)


def preact_resnet(stages, width, bottleneck, classes, stem, projections=True):
    """Each convolution of the main path with a batch norm before it, none beside it, and one at the end."""
    main, beside, end = convolutions(stages, width, bottleneck)
    layers, norms = [(stem, 3, width), *main, *(beside if projections else [])], before(main) + 2 * end
    return weights(layers) + norms + (end + 1) * classes, norms


def cifar_resnet(layers):
    return resnet(((layers - 2) // 6,) * 3, 16, False, 10, 3, projections=False)


PREACT = {
    "preact_resnet18": ((2, 2, 2, 2), 64, False, 10, 3),
    "preact_resnet34": ((3, 4, 6, 3), 64, False, 10, 3),
    "preact_resnet50": ((3, 4, 6, 3), 64, True, 10, 3),
    "preact_resnet110": ((18, 18, 18), 16, False, 10, 3, False),
    "preact_resnet164": ((18, 18, 18), 16, True, 10, 3),
    "preact_resnet200": ((3, 24, 36, 3), 64, True, 1000, 7),
    "preact_resnet1001": ((111, 111, 111), 16, True, 10, 3),
}
LONG = ("preact_resnet200", "preact_resnet1001")


def test_formulas_give_the_published_numbers():
    for stages, bottleneck, expected in (
        ((2, 2, 2, 2), False, 11_689_512),
        ((3, 4, 6, 3), False, 21_797_672),
        ((3, 4, 6, 3), True, 25_557_032),
        ((3, 4, 23, 3), True, 44_549_160),
        ((3, 8, 36, 3), True, 60_192_808),
    ):
        assert resnet(stages, 64, bottleneck, 1000, 7)[0] == expected
    # He et al. 2016, the first paper, table 6.
    for layers, millions, digits in ((20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1)):
        assert round(cifar_resnet(layers)[0] / 1e6, digits) == millions
    # The second paper: 1.7, 1.7 and 10.2 million, which is without batch norm, and the 64.7 of ResNet-200.
    for name, millions in (("preact_resnet110", 1.7), ("preact_resnet164", 1.7), ("preact_resnet1001", 10.2)):
        everything, norms = preact_resnet(*PREACT[name])
        assert round((everything - norms) / 1e6, 1) == millions
    assert round(preact_resnet(*PREACT["preact_resnet200"])[0] / 1e6, 1) == 64.7


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in PREACT]
)
def test_preact_resnets(name):
    image = IMAGENET if name == "preact_resnet200" else CIFAR
    assert counted(getattr(models, name)(), image) == preact_resnet(*PREACT[name])


@pytest.mark.parametrize(
    "layers", [20, 32, 44, pytest.param(56, marks=pytest.mark.slow), pytest.param(110, marks=pytest.mark.slow)]
)
def test_cifar_resnets(layers):
    assert counted(models.cifar_resnet(layers), CIFAR) == cifar_resnet(layers)


# Activations, as the summary has them.


def test_dropout_gives_nothing_of_its_own():
    """Five convolutions, before their pooling, and three dense layers."""
    expected = 32**2 * 12 + 15**2 * 32 + 7**2 * (48 + 48 + 32) + 512 + 512 + 10
    for dropout in (0.5, 0.0):
        assert models.summary(models.AlexNet.small(width=12, dropout=dropout), CIFAR).activations == expected


def test_shortcuts_without_parameters_give_nothing_of_their_own():
    """Of three stages with an identity each, two begin with a shortcut that is padded: a new map."""
    make = partial(models.ResNet, (2, 2, 2), BasicBlock, 10, 4, models.cifar_stem)
    main = 5 * 2 * 32**2 * 4 + 4 * 2 * (16**2 * 8 + 8**2 * 16) + 10
    for shortcut, beside in (
        (models.resnet.Padded, 16**2 * 8 + 8**2 * 16),
        (models.resnet.Projection, 2 * (16**2 * 8 + 8**2 * 16)),
        (NoShortcut, 0),
    ):
        found = models.summary(make(shortcut=shortcut), CIFAR, depth=2)
        assert found.activations == main + beside
        assert any("downsample" in layer.name for layer in found.layers) == (shortcut is not NoShortcut)
