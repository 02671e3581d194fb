"""Losses: against numpy in double precision, finite differences, and the traps of the literature."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

from jaxnets.losses import cross_entropy, dlr, is_targeted, kl, margin, succeeded, targeted

seeds = st.integers(0, 2**32 - 1)
CLASS_LOSSES = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
every_class_loss = pytest.mark.parametrize("name", CLASS_LOSSES)


def rows(seed, k=5, scale=3.0, n=8):
    random = np.random.default_rng(seed)
    return scale * random.normal(size=(n, k)), random.integers(0, k, n), scale * random.normal(size=(n, k))


def distribution(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@cache
def value_and_slope(loss):
    def along(logits, target, direction):
        return jax.jvp(lambda z: loss(z, target), (logits,), (direction,))

    return jax.jit(along), jax.jit(jax.grad(lambda z, target: loss(z, target).sum()))


# Against numpy.


@every_class_loss
@given(seed=seeds, k=st.sampled_from([3, 4, 10]))
def test_values_of_class_losses(name, seed, k):
    z, y, _ = rows(seed, k)
    expected = [getattr(references, name)(*row) for row in zip(z, y, strict=True)]
    with jax.enable_x64(True):
        np.testing.assert_allclose(CLASS_LOSSES[name](jnp.asarray(z), jnp.asarray(y)), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(
            targeted(CLASS_LOSSES[name])(jnp.asarray(z), jnp.asarray(y)),
            -CLASS_LOSSES[name](jnp.asarray(z), jnp.asarray(y)),
        )


@given(seed=seeds)
def test_values_of_kl_and_soft_labels(seed):
    z, _, other = rows(seed)
    p = distribution(other)
    with jax.enable_x64(True):
        expected = [references.kl(*row) for row in zip(z, other, strict=True)]
        np.testing.assert_allclose(kl(jnp.asarray(z), jnp.asarray(other)), expected, rtol=1e-10, atol=1e-12)
        expected = [references.soft_cross_entropy(*row) for row in zip(z, p, strict=True)]
        np.testing.assert_allclose(cross_entropy(jnp.asarray(z), jnp.asarray(p)), expected, rtol=1e-12)


def test_single_precision_far_from_zero():
    z, y, other = rows(0, scale=1e4)
    z32, y32, other32 = jnp.asarray(z, jnp.float32), jnp.asarray(y), jnp.asarray(other, jnp.float32)
    for name, loss in CLASS_LOSSES.items():
        expected = [getattr(references, name)(*row) for row in zip(np.asarray(z32), y, strict=True)]
        np.testing.assert_allclose(loss(z32, y32), expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(kl(z32, other32)).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_leading_axes(shape):
    random = np.random.default_rng(0)
    z, other = jnp.asarray(random.normal(size=(2, *shape, 4)), jnp.float32)
    y = jnp.asarray(random.integers(0, 4, shape))
    for loss in CLASS_LOSSES.values():
        assert loss(z, y).shape == shape
        flat = loss(z.reshape(-1, 4), y.reshape(-1))
        np.testing.assert_allclose(loss(z, y).reshape(-1), flat, rtol=1e-6)
    assert kl(z, other).shape == shape
    assert succeeded(margin, z, y).shape == shape


# Gradients.


@pytest.mark.parametrize("name", [*CLASS_LOSSES, "soft", "kl", "kl of its reference", "targeted"])
@given(seed=seeds)
def test_gradients_against_finite_differences(name, seed):
    z, y, other = rows(seed)
    direction = np.random.default_rng(seed + 1).normal(size=z.shape)
    # Away from kinks: no two logits of a row are nearer than the step can bridge.
    gaps = np.diff(np.sort(z, axis=1), axis=1).min(axis=1)
    smooth = gaps > 1e-3
    h = 1e-6
    with jax.enable_x64(True):
        loss, target = {
            "soft": (cross_entropy, distribution(other)),
            "kl": (kl, other),
            "kl of its reference": (FLIPPED, other),
            "targeted": (TARGETED, y),
        }.get(name, (CLASS_LOSSES.get(name), y))
        slope_of, gradient_of = value_and_slope(loss)
        _, slope = slope_of(z, target, direction)
        difference = (
            slope_of(z + h * direction, target, direction)[0] - slope_of(z - h * direction, target, direction)[0]
        )
        scale = 1 + 1 / gaps[smooth]
        assert (np.abs(slope - difference / (2 * h))[smooth] < 1e-7 * scale).all()
        np.testing.assert_allclose((gradient_of(z, target) * direction).sum(axis=1), slope, rtol=1e-9, atol=1e-9)


TARGETED = targeted(dlr)


def FLIPPED(reference, logits):  # noqa: N802
    """The divergence as a function of its reference."""
    return kl(logits, reference)


def test_gradient_of_kl_vanishes_at_its_reference():
    z, _, other = rows(0)
    gradient = jax.grad(lambda z, target: kl(z, target).sum(), argnums=(0, 1))
    at_reference = gradient(jnp.asarray(z, jnp.float32), jnp.asarray(z, jnp.float32))
    elsewhere = gradient(jnp.asarray(z, jnp.float32), jnp.asarray(other, jnp.float32))
    for zero, not_zero in zip(at_reference, elsewhere, strict=True):
        assert np.abs(zero).max() < 1e-6
        assert np.abs(not_zero).max() > 1e-2


# Traps.


@every_class_loss
def test_all_logits_negative(name):
    z, y = -50 - np.abs(rows(1)[0]), rows(1)[1]
    expected = [getattr(references, name)(*row) for row in zip(z, y, strict=True)]
    np.testing.assert_allclose(
        CLASS_LOSSES[name](jnp.asarray(z, jnp.float32), jnp.asarray(y)), expected, rtol=1e-4, atol=1e-4
    )


@given(seed=seeds)
def test_shift_and_scale(seed):
    z, y, _ = rows(seed)
    with jax.enable_x64(True):
        z, y = jnp.asarray(z), jnp.asarray(y)
        np.testing.assert_allclose(dlr(1e3 * z + 70, y), dlr(z, y), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(margin(1e3 * z + 70, y), 1e3 * margin(z, y), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(cross_entropy(z + 70, y), cross_entropy(z, y), rtol=1e-9, atol=1e-12)


def test_saturated_logits_leave_cross_entropy_without_a_gradient_and_dlr_with_one():
    z, y = 1e3 * jnp.array([3.0, 1.0, 0.5, -1.0]), jnp.array(0)
    assert (jax.grad(cross_entropy)(z, y) == 0).all()
    for loss in (margin, dlr):
        assert np.abs(jax.grad(loss)(z, y)).max() > 1e-4


@pytest.mark.parametrize("loss", [margin, dlr])
def test_compiled_gradients_of_scaled_and_shifted_logits(loss):
    """Logits may be computed once for their maximum and once for its gradient, rounded differently."""
    hidden, scale, shift = (jax.random.normal(jax.random.key(seed), (500, 10)) for seed in range(3))
    y = jnp.zeros(500, jnp.int32)
    gradient = jax.jit(jax.grad(lambda shift: loss(jnp.tanh(hidden) * scale[0] + shift, y).sum()))(shift)
    plain = jax.jit(jax.grad(lambda z: loss(z, y).sum()))(jnp.tanh(hidden) * scale[0] + shift)
    np.testing.assert_allclose(gradient, plain, rtol=1e-3, atol=1e-3)


@given(seed=seeds)
def test_margin_is_positive_where_misclassified(seed):
    z, y, _ = rows(seed)
    z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y)
    wrong = np.asarray(jnp.argmax(z, axis=1) != y)
    for loss in (margin, dlr):
        np.testing.assert_array_equal(loss(z, y) > 0, wrong)
    np.testing.assert_array_equal(succeeded(margin, z, y), wrong)
    np.testing.assert_array_equal(succeeded(targeted(margin), z, y), ~wrong)


@pytest.mark.parametrize(
    ("z", "y", "expected"),
    [
        ([5.0, 5.0, 1.0], 0, 0.0),  # two share the lead
        ([5.0, 5.0, 1.0], 2, 1.0),
        ([5.0, 2.0, 2.0], 0, -1.0),  # two share the second place
        ([5.0, 5.0, 5.0, 0.0], 0, 0.0),  # no third to compare with
        ([5.0, 5.0, 5.0, 0.0], 3, 5.0),
        ([1.0, 1.0, 1.0], 1, 0.0),
    ],
)
def test_dlr_at_ties(z, y, expected):
    assert dlr(jnp.array(z), jnp.array(y)) == expected
    assert np.isfinite(jax.grad(dlr)(jnp.array(z), jnp.array(y))).all()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_number_of_classes(k):
    z, y = jnp.arange(2.0 * k).reshape(2, k), jnp.zeros(2, jnp.int32)
    for loss, needed in ((margin, 2), (dlr, 3)):
        if k < needed:
            for one in (loss, targeted(loss)):
                with pytest.raises(ValueError, match=f"needs at least {needed} classes, got logits of shape"):
                    one(z, y)
        else:
            name = loss.__name__
            np.testing.assert_allclose(loss(z, y), [getattr(references, name)(row, 0) for row in np.asarray(z)])


# Targeted losses and success.


def test_equal_targeted_losses_are_equal():
    assert targeted(margin) == targeted(margin)
    assert hash(targeted(margin)) == hash(targeted(margin))
    assert targeted(margin) != targeted(dlr)
    assert targeted(margin) != margin


@pytest.mark.parametrize(
    "make", [lambda y, z: y, lambda y, z: jax.nn.one_hot(y, 5), lambda y, z: 9 * jax.nn.one_hot(y, 5)]
)
def test_success_with_classes_distributions_and_logits(make):
    z, y, _ = rows(3)
    z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y).at[0].set(int(np.argmax(z[0])))
    right = np.asarray(jnp.argmax(z, axis=1) == y)
    assert right[0]
    assert not right.all()
    np.testing.assert_array_equal(succeeded(cross_entropy, z, make(y, z)), ~right)
    np.testing.assert_array_equal(succeeded(targeted(cross_entropy), z, make(y, z)), right)


def test_distribution_on_one_class_is_that_class():
    z, y, _ = rows(4)
    z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y)
    np.testing.assert_allclose(cross_entropy(z, jax.nn.one_hot(y, 5)), cross_entropy(z, y), rtol=1e-6)


# Errors.


@pytest.mark.parametrize(
    ("loss", "target", "words"),
    [
        (cross_entropy, jnp.zeros(3, jnp.int32), r"integer classes of shape \(2,\)"),
        (cross_entropy, jnp.zeros(2), r"or floats of shape \(2, 4\), got float32\(2,\)"),
        (cross_entropy, jnp.zeros((2, 4), jnp.int32), r"got int32\(2, 4\)"),
        (cross_entropy, jnp.zeros((2, 3)), r"got float32\(2, 3\)"),
        (margin, jnp.zeros((2, 4)), "margin needs integer classes"),
        (dlr, jnp.zeros((2, 4)), "dlr needs integer classes"),
        (kl, jnp.zeros((2, 3)), r"shapes \(2, 4\) and \(2, 3\)"),
        (kl, jnp.zeros(2, jnp.int32), "kl compares two arrays of logits"),
        (targeted(margin), jnp.zeros((2, 4)), "margin needs integer classes"),
    ],
)
def test_bad_targets_raise(loss, target, words):
    with pytest.raises(ValueError, match=words):
        loss(jnp.zeros((2, 4)), target)


def test_a_goal_is_seen_through_partials():
    wanted = targeted(cross_entropy)
    for wrapped in (partial(wanted), Partial(wanted), Partial(partial(wanted)), partial(Partial(wanted))):
        assert is_targeted(wrapped)
    assert not is_targeted(Partial(partial(margin)))
    assert not is_targeted(None)


@every_class_loss
def test_of_no_class_there_is_no_loss(name):
    """Below zero neither, where an index would count from the end."""
    losses = CLASS_LOSSES[name](jnp.array([[3.0, 1.0, 0.0, 2.0]] * 4), jnp.array([-1, 0, 3, 4]))
    np.testing.assert_array_equal(jnp.isnan(losses), [True, False, False, True])


def test_classes_that_cannot_be_are_left_out():
    """A network may rule classes out by logits of -inf: values and gradients are those of the other classes."""
    z, t, p = jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, 3.0]), jnp.array([0.25, 0.25, 0.5])
    out = lambda values, filler: jnp.append(values, filler)  # noqa: E731
    for loss, other, absent in ((kl, t, -jnp.inf), (cross_entropy, p, 0.0)):
        expected, slope = jax.value_and_grad(loss)(z, other)
        value, slope_too = jax.value_and_grad(loss)(out(z, -jnp.inf), out(other, absent))
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(slope_too, out(slope, 0.0))
    assert jnp.isposinf(kl(out(z, -jnp.inf), out(t, 0.0)))
    # The derivative by a probability of zero is not zero.
    np.testing.assert_allclose(jax.grad(cross_entropy, 1)(z, jnp.array([1.0, 0.0, 0.0])), -jax.nn.log_softmax(z))
