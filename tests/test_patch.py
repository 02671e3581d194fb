"""Patches at a random place, scale and angle, and stickers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.diversity import diversified
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.patch import Placement, apply_patch, square, train_patch
from jaxnets.threats import Masked, each_row, sizes

KEY = jax.random.key(0)
FIXED = Placement(scale=(0.5, 0.5), angle=(0.0, 0.0), shape=square)


def coordinates(side):
    """A patch whose channels are its own rows and columns."""
    return jnp.stack(jnp.meshgrid(*2 * [jnp.arange(side, dtype=jnp.float32)], indexing="ij"), axis=-1)


def test_an_upright_patch_is_laid_as_it_is():
    """Of half the side, at its own resolution: it interpolates nothing but by the fraction of a pixel it is off."""
    patch, x = coordinates(6), jnp.full((30, 12, 12, 2), -1.0)
    results = np.asarray(apply_patch(KEY, patch, x, place=FIXED))
    corners = []
    for result in results:
        on = result[:, :, 0] > -0.5
        assert on.sum() in (36, 42, 49)
        down, right = result[on][:, 0], result[on][:, 1]
        rows, columns = np.nonzero(on)
        inner = (down > 0.01) & (down < 4.99) & (right > 0.01) & (right < 4.99)
        np.testing.assert_allclose(np.diff((down - rows)[inner]), 0, atol=1e-4)
        np.testing.assert_allclose(np.diff((right - columns)[inner]), 0, atol=1e-4)
        corners.append((rows.min(), columns.min()))
    assert {0, 6} <= {row for row, _ in corners} or len({row for row, _ in corners}) >= 5
    assert len(set(corners)) > 15


def test_scale_is_the_share_of_the_shorter_side_and_a_disk_has_its_area():
    x, patch = jnp.zeros((60, 40, 60, 1)), jnp.ones((9, 9, 1))
    areas = np.asarray(apply_patch(KEY, patch, x, place=Placement(scale=(0.4, 0.8)))).sum(axis=(1, 2, 3))
    assert areas.min() > 0.95 * np.pi * 8**2
    assert areas.max() < 1.05 * np.pi * 16**2
    assert areas.max() > 2 * areas.min()


def test_a_quarter_turn():
    turned = Placement(scale=(1.0, 1.0), angle=(np.pi / 2, np.pi / 2), shape=square)
    result = apply_patch(KEY, coordinates(6), jnp.zeros((1, 6, 6, 2)), place=turned)[0]
    np.testing.assert_allclose(result, np.rot90(coordinates(6), k=-1), atol=1e-4)
    angles = Placement(scale=(0.8, 0.8), angle=(-np.pi, np.pi))
    results = apply_patch(KEY, coordinates(5), jnp.zeros((9, 8, 8, 2)), place=angles)
    assert len(np.unique(np.round(results, 3), axis=0)) == 9


def test_rows_are_laid_by_their_own_keys():
    x = jnp.zeros((8, 10, 10, 1))
    whole = apply_patch(KEY, jnp.ones((4, 4, 1)), x)
    np.testing.assert_allclose(apply_patch(row_keys(KEY, 8)[3:5], jnp.ones((4, 4, 1)), x[3:5]), whole[3:5], atol=1e-6)


def test_gradient_reaches_the_patch_wherever_it_lies():
    total = lambda patch: apply_patch(KEY, patch, jnp.zeros((20, 12, 12, 1)), place=Placement()).sum()  # noqa: E731
    patch = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 6, 1)), jnp.float32)
    gradient = jax.grad(total)(patch)
    np.testing.assert_allclose((gradient * patch).sum(), total(patch), rtol=1e-4)
    assert (gradient[1:5, 1:5] > 0).all()


@pytest.fixture(scope="module")
def quadrants():
    """A linear model of three channels' means and noise, of which a patch of one colour decides."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.uniform(0.2, 0.8, size=(64, 8, 8, 3)), jnp.float32)
    weights = jnp.eye(3)
    return Partial(lambda weights, x: x.mean(axis=(1, 2)) @ weights, weights), x


def test_a_trained_patch_moves_rows_it_has_not_seen_to_its_class(quadrants):
    logits_fn, x = quadrants
    for wanted in (0, 2):
        target = jnp.full(32, wanted)
        patch = train_patch(KEY, logits_fn, x[:32], target, size=4, epochs=20, batch_size=12)
        assert patch.shape == (4, 4, 3)
        assert patch.min() >= 0
        assert patch.max() <= 1
        laid = apply_patch(jax.random.key(5), patch, x[32:])
        gray = apply_patch(jax.random.key(5), jnp.full_like(patch, 0.5), x[32:])
        share = lambda rows: (jnp.argmax(logits_fn(rows), axis=1) == wanted).mean()  # noqa: E731, B023
        assert share(laid) > 0.9
        assert share(gray) < 0.7
        # The best colour is known: each channel as its weight for the class leads.
        np.testing.assert_array_equal(jnp.argmax(patch[2, 2]), wanted)


def test_untargeted_another_box_and_a_place_of_ones_own(quadrants):
    logits_fn, x = quadrants
    y = jnp.argmax(logits_fn(x), axis=1)
    corner = lambda key, patch, image: image.at[:4, :4].set(patch)  # noqa: E731
    run = partial(train_patch, KEY, logits_fn, x, y, size=4, place=corner, loss=jn.losses.margin, epochs=30)
    patch = run(lower=-1.0, upper=2.0)
    assert patch.min() < -0.5
    assert -1 <= patch.min() <= patch.max() <= 2
    assert (jnp.argmax(logits_fn(apply_patch(KEY, patch, x, place=corner)), axis=1) != y).mean() > 0.4


def test_new_ranges_mean_no_new_trace(quadrants):
    logits_fn, x = quadrants
    traces = []

    def counted(logits_fn, x):
        traces.append(0)
        return logits_fn(x)

    for scale, rate in (((0.3, 0.4), 0.05), ((0.5, 0.6), 0.1)):
        place = Placement(scale=scale)
        patch = train_patch(
            KEY, Partial(counted, logits_fn), x, jnp.zeros(64, int), size=3, epochs=1, place=place, step_size=rate
        )
        assert jnp.isfinite(patch).all()
        count = count if scale[0] > 0.4 else len(traces)  # noqa: F821
    assert count == len(traces)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="images"):
        train_patch(KEY, lambda x: x, jnp.zeros((2, 3)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="size=0"):
        train_patch(KEY, lambda x: x, jnp.zeros((2, 3, 3, 1)), jnp.zeros(2, int), size=0)
    with pytest.raises(ValueError, match=r"\[2, 2, 3\] and \[2, 4, 4, 1\]"):
        apply_patch(KEY, jnp.zeros((2, 2, 3)), jnp.zeros((2, 4, 4, 1)))


# Stickers: a mask is the threat.

MASK = np.arange(12).reshape(3, 4) % 3 == 0


def test_a_masked_threat():
    random = np.random.default_rng(0)
    x, z = jnp.asarray(random.uniform(size=(3, 4)), jnp.float32), jnp.asarray(random.normal(size=(3, 4)), jnp.float32)
    threat = Masked(MASK, 0.3)
    expected = np.where(MASK, np.clip(z, np.maximum(x - 0.3, 0), np.minimum(x + 0.3, 1)), x)
    np.testing.assert_allclose(threat.project(z, x), expected, atol=1e-7)
    np.testing.assert_array_equal(threat.project(threat.project(z, x), x), threat.project(z, x))
    assert threat.size(threat.project(z, x) - x) <= 0.3 + 1e-6
    assert threat.size(z - x) == jnp.inf
    sample = threat.sample(KEY, x)
    np.testing.assert_array_equal(sample[~MASK], x[~MASK])
    assert (jnp.abs(sample - x)[MASK] > 0).all()
    np.testing.assert_array_equal(threat.direction(z, x), jnp.where(MASK, jnp.sign(z), 0))


def test_a_mask_of_another_shape_raises():
    """Of pixels, on grey images: it would broadcast the image."""
    x = jnp.full((2, 3, 4, 1), 0.5)
    with pytest.raises(
        ValueError, match=r"one example, \[3, 4, 1\], got a mask of shape \[3, 4\]: .* mask\[..., None\]"
    ):
        jn.attacks.fgsm(KEY, lambda x: x.reshape(2, -1), x, jnp.zeros(2, int), threat=Masked(MASK, 0.3))


def test_a_mask_is_a_part_of_the_program_and_epsilon_is_not():
    traces = []

    @jax.jit
    def project(threat, z, x):
        traces.append(0)
        return each_row(Masked.project, threat, z, x)

    x, z = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4))
    for epsilon in (0.1, 0.2):
        np.testing.assert_allclose(project(Masked(MASK, epsilon), z, x)[1], np.where(MASK, epsilon, 0), atol=1e-7)
    assert len(traces) == 1
    np.testing.assert_allclose(project(Masked(~MASK, 0.1), z, x)[0], np.where(MASK, 0, 0.1), atol=1e-7)
    assert Masked(MASK) == Masked(MASK.copy()) != Masked(~MASK)
    assert "4 of shape [3, 4]" in repr(Masked(MASK))


def test_a_sticker_trained_under_random_transformations(quadrants):
    """Under transformations that it was not trained on, it breaks more than a random sticker does."""
    logits_fn, x = quadrants
    y = jnp.argmax(logits_fn(x), axis=1)
    mask = np.zeros((8, 8, 1), bool)
    mask[2:7, 1:7] = True
    threat = Masked(mask)
    far = diversified(logits_fn, 1.0, 0.6, samples=4)
    x_adv = jn.attacks.pgd(KEY, far, x, y, threat=threat, steps=10)
    assert (sizes(threat, x_adv, x) <= 1).all()
    assert jnp.where(mask, 0, jnp.abs(x_adv - x)).max() == 0
    random = each_row(lambda threat, key, x: threat.sample(key, x), threat, row_keys(KEY, 64), x)
    seen = diversified(logits_fn, 1.0, 0.6, key=jax.random.key(7))
    broken = lambda rows: (jnp.argmax(seen(jnp.clip(rows, 0, 1)), axis=1) != y).mean()  # noqa: E731
    assert broken(x_adv) > 0.9 > broken(random) + 0.2
