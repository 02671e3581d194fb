"""Every sign of masked gradients on a model that has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_autoattack import CLASSES, images, linear

import jaxnets as jn
from jaxnets.diagnostics import MaskedGradients, masked_gradients

KEY = jax.random.key(0)


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


SOUND = MaskedGradients(0.0, 0.9, 0.5, 0.4, {"square": 0.0}, 0.0, 0.1)


@pytest.mark.parametrize(("change", "said"), [
    ({"zero_gradients": 0.1}, "zero gradients at 10.0%"),
    ({"one_step": 0.95, "many_steps": 0.4}, "label leaking"),
    ({"many_steps": 0.6}, "one step beats many"),
    ({"unbounded": 0.11}, "more than chance"),
    ({"black_box": {"square": 0.02}}, "square, without gradients"),
])  # fmt: skip
def test_each_sign(change, said):
    assert SOUND.signs() == []
    (sign,) = SOUND._replace(**change).signs()
    assert said in sign
