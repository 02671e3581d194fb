"""The pre-activation networks of He et al. 2016 against the paper's figures, in PyTorch and double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets import models
from jaxnets.models.preact_resnet import PreActBlock, PreActBottleneck, as_it_is, padded

FIRST = {"begin": as_it_is, "width": 4}

# As `preact_resnet110`, `preact_resnet164` and `preact_resnet200`, but small; and the image's side.
PUBLISHED = {
    "padded": (partial(models.PreActResNet, (2, 1), PreActBlock, stem=models.cifar_stem, shortcut=padded, **FIRST), 8),
    "bottleneck": (partial(models.PreActResNet, (2, 1), PreActBottleneck, stem=models.cifar_stem, **FIRST), 8),
    "imagenet": (partial(models.PreActResNet, (1, 2), PreActBottleneck, stem=models.imagenet_stem, **FIRST), 17),
}


def blocks_of(params):
    """``(parameters, statistics path, stride)`` of each block in order."""
    names = sorted(name for name in params if name.startswith("layer"))
    return [(name, 2 if name.endswith("_0") and name != "layer1_0" else 1) for name in names]


def logits_in_torch(torch, params, stats, x):
    """Activation, then two branches in the first block; the shortcut free of activations in all others."""
    functional = torch.nn.functional

    def conv(x, layer, stride=1):
        kernel = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2)

    def active(x, norm, seen):
        mean, var, scale, bias = (torch.tensor(a) for a in (seen["mean"], seen["var"], norm["scale"], norm["bias"]))
        return functional.relu(functional.batch_norm(x, mean, var, scale, bias, eps=1e-5))

    def zeros_around(x, features):
        missing = features - x.shape[1]
        return functional.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))

    large = len(params["conv1"]["kernel"]) == 7
    x = torch.tensor(x).permute(0, 3, 1, 2)
    x = active(conv(x, params["conv1"], 2 if large else 1), params["bn1"], stats["bn1"])
    x = functional.max_pool2d(x, 3, 2, 1) if large else x
    for name, stride in blocks_of(params):
        block, seen = params[name], stats.get(name, {})
        begun = x if name == "layer1_0" else active(x, block["bn1"], seen["bn1"])
        three = "conv3" in block
        y = conv(begun, block["conv1"], 1 if three else stride)
        y = conv(active(y, block["bn2"], seen["bn2"]), block["conv2"], stride if three else 1)
        y = conv(active(y, block["bn3"], seen["bn3"]), block["conv3"]) if three else y
        if "shortcut" in block:
            x = conv(begun, block["shortcut"], stride) + y
        else:
            x = zeros_around(x[:, :, ::stride, ::stride], y.shape[1]) + y
    x = active(x, params["bn"], stats["bn"]).mean((2, 3))
    return x @ torch.tensor(params["linear"]["kernel"]) + torch.tensor(params["linear"]["bias"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_those_of_the_figures(name, x64):
    torch = pytest.importorskip("torch")
    make, side = PUBLISHED[name]
    net, random = jn.from_linen(make()), np.random.default_rng(0)
    x = random.uniform(size=(2, side, side, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    params, stats = jax.tree.map(lambda leaf: random.normal(size=leaf.shape) / 2, shapes)
    stats = jax.tree_util.tree_map_with_path(lambda path, leaf: abs(leaf) + (path[-1].key == "var"), stats)
    expected = logits_in_torch(torch, params, stats["batch_stats"], x)
    np.testing.assert_allclose(jax.jit(net.infer)(params, stats, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_forget_and_stay_in_half_precision(name):
    """With ``remat`` and in bfloat16: the same parameters, single; logits in half precision."""
    make, side = PUBLISHED[name]
    x = jnp.zeros((2, side, side, 3))
    net, plain = jn.from_linen(make(remat=True, dtype=jnp.bfloat16)), jn.from_linen(make())
    params, stats = jax.eval_shape(net.init, jax.random.key(0), x)
    assert (params, stats) == jax.eval_shape(plain.init, jax.random.key(0), x)
    logits, moved = jax.eval_shape(net.train, params, stats, x, jax.random.key(0))
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, moved))} == {np.dtype(np.float32)}
