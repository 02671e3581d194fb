"""Every sign of masked gradients on a model that has it."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_autoattack import CLASSES, images, linear

import jaxnets as jn
from jaxnets.diagnostics import (
    MaskedGradients,
    _norms_of_weights,
    _whole_box,
    masked_gradients,
    overfitting_guard,
)  # fmt: skip
from jaxnets.threats import L0, Masked

KEY = jax.random.key(0)
SQUARE = partial(jn.attacks.square, threat=jn.Linf(0.05), queries=500)


def look(model, **options):
    x = np.asarray(images(16))
    return masked_gradients(
        KEY, model, x, np.asarray(jnp.argmax(model(x), -1)), threat=jn.Linf(0.05), steps=5, **options
    )


def test_a_linear_model_shows_no_sign():
    found = look(linear())
    assert found.signs() == []
    assert found.clean == 1
    assert found.unbounded == 0
    assert found.zero_gradients == 0
    assert found.chance == 1 / CLASSES
    assert found.many_steps <= found.one_step < 1
    assert str(found).endswith("no sign")


def test_an_unbounded_attack_needs_a_box():
    with pytest.raises(ValueError, match="masked_gradients needs a finite box"):
        masked_gradients(
            KEY, linear(), np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int), threat=jn.Linf(0.1, 0, np.inf)
        )


def test_quantised_input_hides_gradients():
    found = look(lambda x: linear()(jnp.round(40 * x) / 40))
    assert found.zero_gradients == 1
    assert found.unbounded > found.chance
    assert found.black_box["square"] > 0.1
    assert len(found.signs()) == 3
    assert "sign: square, without gradients, breaks" in str(found)


def test_a_transferred_attack_stands_for_the_black_box():
    masked = lambda x: linear()(jnp.round(40 * x) / 40)  # noqa: E731

    def transfer(key, logits_fn, x, target):
        return jn.attacks.pgd(key, linear(), x, target, threat=jn.Linf(0.05), steps=5)

    found = look(masked, black_box={"transfer": transfer})
    assert list(found.black_box) == ["transfer"]
    assert found.black_box["transfer"] > 0.1


SOUND = MaskedGradients(0.0, 0.9, 0.5, 0.5, 0.4, {"square": 0.0}, 0.0, 0.1)


@pytest.mark.parametrize(("change", "said"), [
    ({"zero_gradients": 0.1}, "zero gradients at 10.0%"),
    ({"leaking": 0.95, "many_steps": 0.4}, "label leaking"),
    ({"many_steps": 0.6}, "one step beats many"),
    ({"unbounded": 0.11}, "more than chance"),
    ({"black_box": {"square": 0.02}}, "square, without gradients"),
])  # fmt: skip
def test_each_sign(change, said):
    assert SOUND.signs() == []
    (sign,) = SOUND._replace(**change).signs()
    assert said in sign


def test_an_attack_that_tells_the_class_shows():
    """FGSM at the wrong rows goes where the model knows the right class, and nowhere else does it."""

    def leaky(x):
        value = x.reshape(-1, 1)
        told = jnp.where(value > 0.58, 1.0, -0.05 - 0.1 * (value - 0.5))
        return jnp.concatenate([jnp.zeros_like(told), told], axis=1)

    x, y = np.full((10, 1, 1, 1), 0.5, np.float32), np.arange(10) % 5 // 4
    found = masked_gradients(KEY, leaky, x, y, threat=jn.Linf(0.1), steps=5)
    assert (found.clean, found.leaking) == (0.8, 1.0)
    assert any("label leaking" in sign for sign in found.signs())


def test_no_more_rows_at_once_than_an_attack_takes():
    """For what a network computes of all rows of a data set no memory is large enough."""
    seen, one = set(), linear()

    def watched(x):
        seen.add(len(x))
        return one(x)

    x, y = np.asarray(images(200)), np.zeros(200, int)
    masked_gradients(KEY, watched, x, y, threat=jn.Linf(0.05), steps=1, black_box={})
    assert max(seen) == jn.parallel.rows_at_once() < 200


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_the_black_box_has_any_name(name):
    found = look(lambda x: linear()(jnp.round(40 * x) / 40), black_box={name: SQUARE})
    assert found.black_box[name] > 0.1


def test_rows_and_classes_of_the_guard_are_those_of_evaluate():
    net, x = jn.from_linen(jn.models.MLP((), classes=2)), np.full((4, 3), 0.5, np.float32)
    settings = {"attack": partial(jn.attacks.fgsm, threat=jn.Linf(0.1)), "threat": jn.Linf(0.1), "steps": 1}
    state = jn.training.init_state(KEY, *net.init(KEY, x), optax.sgd(0.1))
    lists, arrays = (overfitting_guard(KEY, net, x, y, **settings)(state) for y in ([0] * 4, np.zeros(4, int)))
    assert lists == arrays
    with pytest.raises(ValueError, match="overfitting_guard takes rows inside the threat's box"):
        overfitting_guard(KEY, net, 255 * x, np.zeros(4, int), **settings)


def test_the_whole_box_of_a_threat():
    x = np.zeros((2, 3, 1), np.float32)
    mask = np.array([[True], [False], [True]])
    for threat, epsilon in [
        (jn.Linf(0.1), 1.0), (jn.L2(0.1), 3**0.5), (jn.L1(0.1, top=2), 3.0), (L0(1), 3.0), (Masked(mask, 0.1), 1.0)
    ]:  # fmt: skip
        whole = _whole_box(threat, x)
        np.testing.assert_allclose(whole.epsilon, epsilon, rtol=1e-6)
        assert replace(whole, epsilon=threat.epsilon) == threat


RESNET14 = [f"layer{stage}_{number}/conv{place}" for stage in (1, 2, 3) for number in (0, 1) for place in (1, 2)]
VIT_BLOCK = [*(f"attention/{part}" for part in ("query", "key", "value", "out")), "fc1", "fc2"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def gradient_norms(module, *image):
    """Of a network with random weights."""
    net, random = jn.from_linen(module), np.random.default_rng(0)
    batch = jn.types.Batch(random.uniform(size=(6, *image)).astype(np.float32), np.arange(6))
    variables = jax.eval_shape(net.init, KEY, batch.x)
    variables = jax.tree.map(lambda leaf: np.float32(random.uniform(0.1, 0.3, size=leaf.shape)), variables)
    return jn.diagnostics.gradient_norms(net, jn.objectives.standard(net), *variables, batch, KEY)


def test_gradient_norms_are_those_of_the_kernels():
    net = jn.from_linen(jn.models.MLP((5, 4)))
    x, y = jax.random.uniform(jax.random.key(0), (6, 3)), jnp.arange(6) % 10
    params, stats = jax.jit(net.init)(jax.random.key(1), x)
    batch, key = jn.types.Batch(x, y), jax.random.key(2)
    objective = jn.objectives.standard(net)
    norms = jn.diagnostics.gradient_norms(net, objective, params, stats, batch, key)
    assert list(norms) == ["Dense_0", "Dense_1", "Dense_2"]
    value_and_grad = jax.jit(jax.value_and_grad(lambda params: objective(params, stats, batch, key)[0]))
    step, gradient = 1e-3, value_and_grad(params)[1]
    for name, norm in norms.items():
        kernel = np.asarray(params[name]["kernel"])
        direction = np.asarray(gradient[name]["kernel"] / np.linalg.norm(gradient[name]["kernel"]))
        ahead, behind = (
            value_and_grad({**params, name: params[name] | {"kernel": kernel + s * direction}})[0]
            for s in (step, -step)
        )
        np.testing.assert_allclose(norm, (ahead - behind) / (2 * step), rtol=0.02)


def test_gradient_norms_are_of_all_weights_of_a_layer():
    """By whatever name; not of biases, of which those of attention have two dimensions."""
    arrays = {name: normal(2, 3, seed=seed) for seed, name in enumerate(("kernel_0", "kernel_1", "centers", "bias"))}
    norms = _norms_of_weights(
        {"a": {"b": arrays, "c": {"scale": normal(5), "bias": normal(5)}}, "positions": normal(2, 2)}
    )
    weights = np.concatenate([arrays[name].ravel() for name in ("kernel_0", "kernel_1", "centers")])
    assert list(norms) == ["a/b", ""]
    np.testing.assert_allclose(norms["a/b"], np.sqrt((weights**2).sum()), rtol=1e-12)


@pytest.mark.parametrize(("module", "image", "layers"), [
    (jn.models.RBFNetwork(4), (3,), ["RadialBasis_0", "Dense_0"]),
    (jn.models.LeNet5(), (28, 28, 1), ["Conv_0", "SparseC3_0", "Dense_0", "Dense_1"]),
    (jn.models.ViT(10, 4, 6, 1, 2), (8, 8, 3), ["patches", *(f"block0/{part}" for part in VIT_BLOCK), "head"]),
    (jn.models.cifar_resnet(14, width=4), (8, 8, 3), ["conv1", *RESNET14, "fc"]),
], ids=["rbf_network", "lenet5", "vit", "resnet"])  # fmt: skip
def test_gradient_norms_are_in_the_order_of_the_layers(module, image, layers):
    assert list(gradient_norms(module, *image)) == layers


def test_gradient_norms_are_of_recurrent_layers_too():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.RNN(nn.GRUCell(8))(x)[:, -1])

    found = gradient_norms(Recurrent(), 6, 4)
    assert {"head", "GRUCell_0/hz", "GRUCell_0/in"} <= found.keys()
    assert all(norm > 0 for norm in found.values())
