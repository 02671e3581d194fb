"""Augmentations against all that they may give, and mixtures against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.data import cutmix, cutout, mixup, random_crop, random_flip
from jaxnets.types import Batch

ROWS, CLASSES = 64, 5


def images(rows=ROWS, shape=(6, 5, 2), seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        jnp.asarray(rng.uniform(0.1, 1, (rows, *shape)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, rows))
    )


def test_crops_are_those_of_the_padded_image_and_all_of_them_occur():
    batch = images()
    cropped = random_crop(jax.random.key(1), batch, padding=1)
    padded = np.pad(batch.x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    offsets = {}
    for row in range(ROWS):
        found = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if np.array_equal(cropped.x[row], padded[row, i : i + 6, j : j + 5])
        ]
        assert len(found) == 1
        offsets[row] = found[0]
    assert set(offsets.values()) == {(i, j) for i in range(3) for j in range(3)}
    np.testing.assert_array_equal(cropped.y, batch.y)


def test_half_of_the_images_are_mirrored():
    batch = images(400)
    x, flipped = np.asarray(batch.x), np.asarray(random_flip(jax.random.key(2), batch).x)
    same = (flipped == x).all((1, 2, 3))
    np.testing.assert_array_equal(flipped[~same], x[~same][:, :, ::-1])
    assert 150 < same.sum() < 250  # five deviations of ten


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_cutout_fills_a_square_about_any_pixel(size):
    batch = images(600)
    holes = np.asarray(cutout(jax.random.key(3), batch, size=size, fill=jnp.array([0.0, 0.0625])).x)
    cut = (holes == [0.0, 0.0625]).all(-1)
    np.testing.assert_array_equal(holes[~cut], np.asarray(batch.x)[~cut])
    expected = {
        tuple(map(tuple, grid))
        for i in range(6)
        for j in range(5)
        for grid in [[[i - size // 2 <= a < i - size // 2 + size and j - size // 2 <= b < j - size // 2 + size
                       for b in range(5)] for a in range(6)]]
    }  # fmt: skip
    assert {tuple(map(tuple, grid.tolist())) for grid in cut} == expected


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_labels_of_other_classes_are_refused(mix):
    batch = images(4, shape=(8, 6, 1))
    with pytest.raises(ValueError, match="labels of 5 classes are to be mixed as of 7"):
        mix(jax.random.key(0), batch._replace(y=jnp.ones((4, 5)) / 5), classes=7)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_labels_of_no_class_are_no_numbers(mix):
    batch = images(4, shape=(8, 6, 1))
    assert not np.isnan(mix(jax.random.key(0), batch._replace(y=jnp.array([0, 1, 2, 6])), classes=7).y).any()
    for wrong in (-1, 7):
        mixed = mix(jax.random.key(0), batch._replace(y=jnp.array([0, 1, 2, wrong])), classes=7).y
        assert np.isnan(mixed[3]).all()


@pytest.mark.parametrize("augment", [random_crop, random_flip, partial(cutout, size=3)])
def test_a_row_does_not_depend_on_its_batch(augment):
    batch, key = images(8), jax.random.key(4)
    whole = augment(key, batch)
    part = jax.jit(augment)(key, Batch(batch.x[:3], batch.y[:3]))
    np.testing.assert_array_equal(part.x, whole.x[:3])


def test_mixup_is_the_mean_of_two_rows():
    batch = images()
    mixed = mixup(jax.random.key(5), batch, classes=CLASSES)
    x, y = np.asarray(batch.x, float), np.eye(CLASSES)[np.asarray(batch.y)]
    shares = []
    for row in range(ROWS):
        fits = []
        for other in set(range(ROWS)) - {row}:
            apart, gone = (x[other] - x[row]).ravel(), (x[other] - np.asarray(mixed.x[row], float)).ravel()
            share = apart @ gone / (apart @ apart)
            if np.abs(share * apart - gone).max() < 1e-5:
                fits.append((other, share))
        if not fits:  # paired with itself
            np.testing.assert_allclose(mixed.x[row], x[row], rtol=1e-6)
            continue
        [(other, share)] = fits
        shares.append(share)
        np.testing.assert_allclose(mixed.y[row], share * y[row] + (1 - share) * y[other], atol=1e-4)
    assert len(shares) > ROWS - 10
    assert np.ptp(shares) < 1e-3


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    pair = Batch(jnp.eye(2), jnp.arange(2))
    keys = jax.random.split(jax.random.key(6), 4000)
    mixed = jax.jit(jax.vmap(lambda key: mixup(key, pair, classes=2, alpha=alpha).x[0]))(keys)
    share = np.asarray(mixed)[:, 0]  # 1 where a row was paired with itself, which half of the permutations do
    share = share[share < 1]
    assert np.mean(share) == pytest.approx(0.5, abs=0.04)
    assert np.var(share) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_cutmix_takes_a_rectangle_of_another_row_and_its_share_of_the_label():
    batch = images(32, shape=(8, 6, 1))
    x, y = np.asarray(batch.x), np.eye(CLASSES)[np.asarray(batch.y)]
    boxes = set()
    for seed in range(12):
        mixed = cutmix(jax.random.key(seed), batch, classes=CLASSES)
        for row in range(0, 32, 5):
            foreign = (np.asarray(mixed.x[row]) != x[row]).all(-1)
            if not foreign.any():
                continue
            rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
            assert foreign.sum() == len(rows) * len(columns)
            assert (np.diff(rows) == 1).all()
            assert (np.diff(columns) == 1).all()
            [other] = [k for k in range(32) if (np.asarray(mixed.x[row])[foreign] == x[k][foreign]).all()]
            share = 1 - foreign.mean()
            np.testing.assert_allclose(mixed.y[row], share * y[row] + (1 - share) * y[other], atol=1e-6)
            boxes.add((len(rows), len(columns)))
    assert len(boxes) > 4


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float16])
def test_labels_of_cutmix_count_the_pixels_of_images_in_few_bits(dtype):
    black_and_white = jnp.stack([jnp.zeros((300, 300, 1), dtype), jnp.ones((300, 300, 1), dtype)])
    for seed in range(6):
        mixed = cutmix(jax.random.key(seed), Batch(black_and_white, jnp.arange(2)), classes=2)
        white = mixed.x.astype(jnp.float32).mean((1, 2, 3))
        np.testing.assert_allclose(mixed.y, jnp.stack([1 - white, white], axis=1), atol=1e-6)


def test_mixtures_of_mixtures_keep_their_labels_probabilities():
    batch, keys = images(16), jax.random.split(jax.random.key(7))
    mixed = cutmix(keys[0], mixup(keys[1], batch, classes=CLASSES), classes=CLASSES)
    np.testing.assert_allclose(mixed.y.sum(-1), 1, rtol=1e-6)
    assert (np.asarray(mixed.y) >= 0).all()


def test_an_objective_of_mixed_rows_is_the_mean_of_two_cross_entropies():
    batch, key = images(16, shape=(4, 4, 1)), jax.random.key(8)
    net = jn.from_linen(jn.models.MLP((), classes=CLASSES))
    params, stats = net.init(key, batch.x)
    mixed = []

    def watched(key, batch):
        mixed.append(mixup(key, batch, classes=CLASSES))
        return mixed[-1]

    objective = jn.objectives.augmented(jn.objectives.standard(net), watched)
    value, (_, metrics) = objective(params, stats, batch, key)
    log_p = np.asarray(jax.nn.log_softmax(net.infer(params, stats, mixed[0].x)), float)
    assert float(value) == pytest.approx(-(np.asarray(mixed[0].y) * log_p).sum(1).mean(), rel=1e-5)
    right = log_p.argmax(1) == np.asarray(mixed[0].y).argmax(1)
    assert float(metrics["accuracy"]) == pytest.approx(right.mean())


def test_adversarial_training_on_augmented_rows_attacks_those():
    batch, key = images(8, shape=(4, 4, 1)), jax.random.key(9)
    net = jn.from_linen(jn.models.MLP((), classes=CLASSES))
    params, stats = net.init(key, batch.x)
    attack = partial(jn.attacks.fgsm, threat=jn.Linf(0.1))
    plain = jn.objectives.standard(net)
    crop = partial(mixup, classes=CLASSES)
    attacked = jn.objectives.augmented(jn.objectives.adversarial(net, attack), crop)(params, stats, batch, key)[0]
    assert attacked > jn.objectives.augmented(plain, crop)(params, stats, batch, key)[0]


@pytest.mark.parametrize(
    ("augment", "says"),
    [
        (partial(random_crop, padding=-1), "padding of 0 or more pixels, got -1"),
        (partial(cutout, size=0), "at least one pixel, got size=0"),
        (partial(mixup, classes=2, alpha=0.0), r"mixup draws from Beta.*got 0.0"),
        (partial(cutmix, classes=2, alpha=-1.0), r"cutmix draws from Beta.*got -1.0"),
    ],
)
def test_impossible_settings_are_refused(augment, says):
    with pytest.raises(ValueError, match=says):
        augment(jax.random.key(0), images(2))


@pytest.mark.parametrize("augment", [random_crop, random_flip, cutout, partial(cutmix, classes=2)])
def test_rows_that_are_no_images_are_refused(augment):
    with pytest.raises(ValueError, match=r"takes images \[B, H, W, C\], got shape \[2, 3\]"):
        augment(jax.random.key(0), Batch(jnp.ones((2, 3)), jnp.zeros(2, int)))
