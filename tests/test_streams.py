"""Streams of large data sets: transformations against numpy, order, resuming, workers, processes, damage, devices."""

import io
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from jaxnets import data, parallel
from jaxnets.data import originals, transforms

SIDE = 8
crop = partial(data.random_resized_crop, size=SIDE)
center = partial(data.resize_and_center_crop, size=SIDE, shorter_side=SIDE + 2)
train = partial(data.training_batches, transform=partial(data.augment, size=SIDE), workers=0)
evaluate = partial(data.evaluation_batches, transform=center, workers=0)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


class Noise:
    """Rows of random images of several sizes; row ``i`` has label ``i``."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"image": noise(12 + i % 5, 20 - i % 3, i), "label": np.int32(i)}


def take(stream, steps):
    batches = [jax.tree.map(np.array, batch) for batch in itertools.islice(stream, steps)]
    stream.close()
    return batches


def assert_same(left, right):
    assert len(left) == len(right) > 0
    jax.tree.map(np.testing.assert_array_equal, left, right)


def joined(parts):
    """The batches of all processes, put together."""
    return [jax.tree.map(lambda *rows: np.concatenate(rows), *batches) for batches in zip(*parts, strict=True)]


# Transformations


def reference_resize(image, height, width):
    """Bilinear interpolation with a triangle as wide as an output pixel, in double precision, one axis at a time."""

    def weights(old, new):
        scale = max(old / new, 1)
        centers = (np.arange(new) + 0.5) * old / new
        triangle = np.maximum(0, 1 - abs(np.arange(old) + 0.5 - centers[:, None]) / scale)
        return triangle / triangle.sum(1, keepdims=True)

    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("ih,jw,hwc->ijc", rows, columns, image.astype(np.float64))


def reference_box(rng, height, width):
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= width and h <= height:
            top = rng.integers(0, height - h + 1)
            return top, rng.integers(0, width - w + 1), h, w
    raise AssertionError("no draw fits")


@pytest.mark.parametrize("seed", range(6))
def test_random_resized_crop_is_the_stated_part(seed):
    image = noise(60, 90)
    top, left, h, w = reference_box(np.random.default_rng(seed), 60, 90)
    expected = reference_resize(image[top : top + h, left : left + w], 24, 24)
    got = data.random_resized_crop(np.random.default_rng(seed), image, size=24)
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got, expected, atol=1.01)  # Pillow rounds after each axis


def test_random_resized_crop_covers_its_ranges():
    rng = np.random.default_rng(0)
    boxes = np.array([transforms._crop_box(rng, 1000, 1000, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    top, left, h, w = boxes.T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.maximum(top + h, left + w) <= 1000).all()
    area, ratio = h * w / 1e6, w / h
    assert 0.079 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert ratio.min() == pytest.approx(3 / 4, abs=0.01)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.01)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.015)
    small = area < 0.5  # all of these fit, so that their areas and places are uniform
    assert area[small].mean() == pytest.approx(0.29, abs=0.02)
    assert (top[small] / (1000 - h[small])).mean() == pytest.approx(0.5, abs=0.03)
    assert (left[small] / (1000 - w[small])).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"), [(400, 9, (194, 206), (0, 9)), (9, 400, (0, 9), (194, 206))]
)
def test_what_no_draw_fits_is_cropped_in_the_middle(height, width, rows, columns):
    image = noise(height, width)
    expected = reference_resize(image[slice(*rows), slice(*columns)], SIDE, SIDE)
    np.testing.assert_allclose(crop(np.random.default_rng(0), image), expected, atol=1.01)


def test_horizontal_flip_mirrors_half():
    image, rng = noise(4, 5), np.random.default_rng(0)
    flipped = [data.horizontal_flip(rng, image) for _ in range(400)]
    mirrored = sum(np.array_equal(one, image[:, ::-1]) for one in flipped)
    assert mirrored + sum(np.array_equal(one, image) for one in flipped) == 400
    assert 160 < mirrored < 240


@pytest.mark.parametrize("seed", range(4))
def test_pca_lighting_adds_one_shift_to_all_pixels(seed):
    image = noise(7, 9, seed)
    alpha = np.random.default_rng(seed).normal(0, 3.0, 3)
    pca = data.IMAGENET_PCA
    shift = sum(alpha[k] * pca.eigenvalues[k] * pca.eigenvectors[:, k] for k in range(3))
    expected = np.clip(np.rint(image.astype(np.float64) + 255 * shift), 0, 255)
    got = data.pca_lighting(np.random.default_rng(seed), image, std=3.0)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


def test_pca_lighting_moves_pixels_along_the_components():
    """The shifts of a grey image have the covariance ``V diag((255 * std * eigenvalue)^2) V'``."""
    grey, rng = np.full((1, 1, 3), 128, np.uint8), np.random.default_rng(0)
    shifts = np.array([data.pca_lighting(rng, grey)[0, 0] for _ in range(4000)], float) - 128
    values, vectors = data.IMAGENET_PCA
    expected = vectors @ np.diag((255 * 0.1 * values) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(shifts.T), expected, atol=1.2)  # rounding to bytes adds 1/12
    assert abs(shifts.mean(0)).max() < 0.4


def test_pixel_pca_is_that_of_all_pixels():
    images = [noise(h, w, h) // (1, 2, 4) for h, w in ((3, 5), (8, 2), (6, 6))]
    images = [(image + image[..., :1] // 3).astype(np.uint8) for image in images]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    values, vectors = data.pixel_pca(iter(images))
    assert (np.diff(values) < 0).all()
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, np.cov(pixels.T, bias=True), atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


def test_imagenet_components_are_orthonormal_and_the_first_is_brightness():
    values, vectors = data.IMAGENET_PCA
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)
    assert (np.diff(values) < 0).all()
    assert abs(vectors[:, 0].sum()) == pytest.approx(np.sqrt(3), abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(30, 47), (47, 30), (13, 13)])
def test_resize_and_center_crop(height, width):
    image = noise(height, width)
    new_h, new_w = (20 * height // 13, 20) if height == width else (20, 31) if height < width else (31, 20)
    top, left = (new_h - 16) // 2, (new_w - 16) // 2
    expected = reference_resize(image, new_h if height != width else 20, new_w)[top : top + 16, left : left + 16]
    got = data.resize_and_center_crop(image, size=16, shorter_side=20)
    np.testing.assert_allclose(got, expected, atol=1.01)


def test_transformations_refuse_what_makes_no_sense():
    rng = np.random.default_rng(0)
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 1), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        for function in (crop, partial(data.pca_lighting), partial(data.augment)):
            with pytest.raises(ValueError, match="uint8 with three channels, got"):
                function(rng, wrong)
        with pytest.raises(ValueError, match="uint8 with three channels, got"):
            data.pixel_pca([wrong])
    with pytest.raises(ValueError, match="at least one pixel"):
        data.pixel_pca([])
    for size in (0, 11):
        with pytest.raises(ValueError, match=r"size must be in 1\.\.shorter_side"):
            data.resize_and_center_crop(noise(4, 4), size=size, shorter_side=10)


# Batches


def test_training_batches_take_every_row_at_most_once_an_epoch():
    batches = take(train(Noise(23), 5, seed=1), 12)
    for batch in batches:
        assert batch["image"].shape == (5, SIDE, SIDE, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    epochs = [np.concatenate([batch["label"] for batch in batches[4 * e : 4 * e + 4]]).tolist() for e in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set(itertools.chain(*epochs)) == set(range(23))  # rows that one epoch leaves out come in another


def test_every_row_of_every_epoch_has_draws_of_its_own():
    def drawn(seed):
        stream = train(Noise(6), 3, seed=seed, transform=lambda rng, image: rng.integers(0, 2**60, (1, 1, 3)))
        return [int(row[0, 0, 0]) for batch in take(stream, 6) for row in batch["image"]]

    first = drawn(0)
    assert len(set(first)) == 18
    assert drawn(0) == first
    assert not set(drawn(1)) & set(first)


def test_resumed_at_any_step_equals_never_stopped():
    rows = Noise(23)
    whole = take(train(rows, 5, seed=7), 9)
    for start in (1, 4, 6):
        assert_same(take(train(rows, 5, seed=7, start=np.int64(start)), 9 - start), whole[start:])
    stream = train(rows, 5, seed=7)
    for _ in range(3):
        next(stream)
    state = stream.get_state()
    resumed = train(rows, 5, seed=7)
    resumed.set_state(state)
    assert_same(take(resumed, 6), whole[3:])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_shards_put_together_are_the_whole(count):
    rows = Noise(20)
    parts = [take(train(rows, 6, seed=2, shard=(i, count)), 7) for i in range(count)]
    assert parts[0][0]["label"].shape == (6 // count,)
    assert_same(joined(parts), take(train(rows, 6, seed=2), 7))
    parts = [list(evaluate(rows, 6, shard=(i, count))) for i in range(count)]
    assert_same(joined(parts), list(evaluate(rows, 6)))


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 1)])
def test_evaluation_loses_no_row_and_counts_none_twice(n, batch_size):
    rows, batches = Noise(n), list(evaluate(Noise(n), batch_size))
    assert all(batch["image"].shape == (batch_size, SIDE, SIDE, 3) for batch in batches)
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.dtype == bool
    assert np.concatenate([batch["label"] for batch in batches])[valid].tolist() == list(range(n))
    images = np.concatenate([batch["image"] for batch in batches])[valid]
    np.testing.assert_array_equal(images, [center(rows[i]["image"]) for i in range(n)])


def test_batches_refuse_what_makes_no_sense():
    for wrong, said in (
        ({"batch_size": 24, "seed": 0}, r"batch_size must be in 1\.\.23"),
        ({"batch_size": 0, "seed": 0}, "got batch_size 0"),
        ({"batch_size": 5, "seed": 0, "shard": (0, 2)}, "batch_size 5, index 0 of 2"),
        ({"batch_size": 4, "seed": 0, "shard": (2, 2)}, "index 2 of 2"),
        ({"batch_size": 4, "seed": -1}, "got seed -1"),
        ({"batch_size": 4, "seed": 2**32}, "seed must be in"),
        ({"batch_size": 4, "seed": 0, "start": -1}, "start -1"),
    ):
        with pytest.raises(ValueError, match=said):
            train(Noise(23), **wrong)
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(Noise(0), 4)


# Data sets


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture
def mocked(monkeypatch):
    """Five made-up rows of any data set; the stock encoder of images would be TensorFlow's."""
    with originals.quiet_tfds() as tfds:
        from tensorflow_datasets.core.features import image_feature

        monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", lambda self, image: encoded(image))
        with tfds.testing.mock_data(num_examples=5):
            yield tfds


@pytest.mark.parametrize(
    ("name", "split", "classes"),
    [
        ("imagenet2012", "validation", 1000),
        ("imagenette", "train", 10),
        ("imagenette/160px-v2", "validation", 10),
        ("cifar100", "test", 100),
        ("svhn_cropped", "extra", 10),
    ],
)
def test_any_image_classification_is_opened(name, split, classes, mocked, tmp_path):
    rows = data.open_images(name, split, tmp_path)
    stock = mocked.data_source(name, split=split, data_dir=tmp_path, download=False)
    assert len(rows) == len(stock) == 5
    assert len(rows.classes) == classes
    for i in range(5):
        np.testing.assert_array_equal(rows[i]["image"], stock[i]["image"])
        assert rows[i]["label"] == stock[i]["label"]
    batch = take(train(rows, 4, seed=0), 1)[0]
    assert batch["image"].shape == (4, SIDE, SIDE, 3)
    assert set(batch["label"]) <= {int(row["label"]) for row in stock}
    assert sum(batch["valid"].sum() for batch in evaluate(rows, 4)) == 5


ROWS = [
    encoded(noise(20, 30)),
    encoded(noise(25, 15)[..., 0]),  # grey
    encoded(np.concatenate([noise(9, 9), noise(9, 9)[..., :1]], -1)),  # with transparency
    encoded(noise(16, 16), "JPEG"),
    encoded(noise(40, 21), "JPEG"),
]
CONFIG = "imagenette/160px-v2"


@pytest.fixture
def prepared(tmp_path):
    """Writes ``contents`` as a prepared imagenette, in array_record unless told otherwise, and returns its folder."""

    def write(contents=ROWS, file_format="array_record"):
        with originals.quiet_tfds() as tfds:
            from tensorflow_datasets.core.registered import skip_registration

            stock = tfds.builder_cls("imagenette")
            with skip_registration():

                class Builder(stock):
                    name = stock.name

                    def _split_generators(self, dl_manager):
                        return {"train": self._generate_examples(), "validation": self._generate_examples()}

                    def _generate_examples(self):
                        for i, content in enumerate(contents):
                            yield i, {"image": content, "label": i}

            builder = Builder(config="160px-v2", data_dir=str(tmp_path), file_format=file_format)
            builder.download_and_prepare()
            return tmp_path / CONFIG / "1.0.0"

    return write


def test_images_of_any_form_become_three_channels(prepared, tmp_path):
    prepared()
    rows = data.open_images(CONFIG, "train", tmp_path)
    by_label = {int(row["label"]): row["image"] for row in (rows[i] for i in range(len(rows)))}
    np.testing.assert_array_equal(by_label[0], noise(20, 30))
    np.testing.assert_array_equal(by_label[1], np.repeat(noise(25, 15)[..., :1], 3, -1))
    np.testing.assert_array_equal(by_label[2], noise(9, 9))
    assert by_label[4].shape == (40, 21, 3)
    assert rows.classes[0] == "n01440764"
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=rf"row must be in 0\.\.4, got {wrong}"):
            rows[wrong]


def test_neither_the_number_of_workers_nor_a_stop_changes_a_batch(prepared, tmp_path):
    prepared()
    rows = data.open_images(CONFIG, "train", tmp_path)
    whole = take(train(rows, 2, seed=3), 5)
    assert_same(take(train(rows, 2, seed=3, workers=2), 5), whole)
    assert_same(take(train(rows, 2, seed=3, workers=1, start=2), 3), whole[2:])


def test_workers_evaluate_every_row_and_leave_when_closed(prepared, tmp_path):
    prepared()
    rows = data.open_images(CONFIG, "validation", tmp_path)
    stream = evaluate(rows, 2, workers=2)
    assert_same([jax.tree.map(np.array, batch) for batch in stream], list(evaluate(rows, 2)))
    stream.close()
    assert not [child for child in multiprocessing.active_children() if "grain" in child.name]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(workers, prepared, tmp_path):
    folder = prepared([*ROWS[:4], ROWS[4][:200]])
    rows = data.open_images(CONFIG, "train", tmp_path)
    with pytest.raises(data.DataError, match=r"row \d of split train of .* cannot be read .*Prepare") as caught:
        list(evaluate(rows, 5, workers=workers))
    assert str(folder) in str(caught.value)


def test_a_damaged_record_is_named(prepared, tmp_path):
    shard = next(prepared().glob("*-train.array_record*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(data.DataError, match=r"Prepare that folder anew|can be read as array_record"):
        list(evaluate(data.open_images(CONFIG, "train", tmp_path), 5))


def test_what_is_not_prepared_says_where_it_belongs(tmp_path):
    for name, place in (("imagenet2012", "imagenet2012/5.1.0"), (CONFIG, f"{CONFIG}/1.0.0")):
        with pytest.raises(data.DataError) as caught:
            data.open_images(name, "train", tmp_path)
        for part in ("is not prepared", str(tmp_path / place), "array_record", "TensorFlow"):
            assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def _truncate(folder):
    shard = next(folder.glob("*-train.array_record*"))
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    "harm",
    [
        _truncate,
        lambda folder: next(folder.glob("*-train.array_record*")).unlink(),
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
    ],
    ids=["truncated", "no shard", "no info", "bad info"],
)
def test_a_damaged_folder_is_refused(harm, prepared, tmp_path):
    folder = prepared()
    harm(folder)
    with pytest.raises(data.DataError) as caught:
        data.open_images(CONFIG, "train", tmp_path)[0]
    assert str(folder.parent) in str(caught.value)


def test_an_absent_split_and_unknown_names_are_refused(prepared, tmp_path):
    prepared()
    with pytest.raises(data.DataError, match="has no split test of imagenette/160px-v2"):
        data.open_images(CONFIG, "test", tmp_path)
    for name in ("imagenet2013", "imagenette/17px"):
        with pytest.raises(ValueError, match=f"no data set '{name}'"):
            data.open_images(name, "train", tmp_path)
    with pytest.raises(ValueError, match="imdb_reviews is no image classification: its features are text, label"):
        data.open_images("imdb_reviews", "train", tmp_path)


# Devices


def test_prefetched_batches_lie_on_all_devices_in_order(eight_devices):
    sharding = parallel.by_rows(parallel.data_mesh(eight_devices))
    batches = take(train(Noise(40), 16, seed=0), 5)
    stream = data.prefetch_to_device(train(Noise(40), 16, seed=0), sharding)
    placed = list(itertools.islice(stream, 5))
    for batch in placed:
        assert batch["image"].sharding.is_equivalent_to(sharding, 4)
        assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(2,)}
    assert_same([jax.tree.map(np.asarray, batch) for batch in placed], batches)


def test_prefetched_batches_outlive_the_worker_that_made_them():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = take(train(Noise(40), 16, seed=0), 3)
    stream = train(Noise(40), 16, seed=0, workers=1)
    placed = list(itertools.islice(data.prefetch_to_device(stream, sharding), 3))
    stream.close()
    assert_same([jax.tree.map(np.asarray, batch) for batch in placed], expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prefetch_is_so_many_batches_ahead_and_ends_with_the_last(size):
    pulled = []
    numbers = (pulled.append(i) or np.full(2, i) for i in range(5))
    stream = data.prefetch_to_device(numbers, jax.sharding.SingleDeviceSharding(jax.devices()[0]), size=size)
    assert not pulled
    assert next(stream).tolist() == [0, 0]
    assert pulled == list(range(size + 1))
    assert [int(batch[0]) for batch in stream] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        data.prefetch_to_device([], jax.sharding.SingleDeviceSharding(jax.devices()[0]), size=0)


PROCESS = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jaxnets import data, parallel
rows = [{"image": np.full((1, 1, 3), i, np.uint8), "label": np.int32(i)} for i in range(20)]
batches = data.training_batches(rows, 8, seed=0, workers=0, transform=lambda rng, image: image)
sharding = parallel.by_rows(parallel.data_mesh())
for _, batch in zip(range(3), data.prefetch_to_device(batches, sharding)):
    assert batch["label"].shape == (8,), batch["label"].shape
    for part in batch["label"].addressable_shards:
        print(part.index[0].start, *part.data.tolist())
"""


def test_two_processes_hold_the_batches_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [start([sys.executable, "-c", PROCESS, port, str(i)]) for i in range(2)]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    parts = [[[int(word) for word in line.split()] for line in out.splitlines()] for out, _ in said]
    for step, batch in enumerate(take(train(Noise(20), 8, seed=0), 3)):
        held = sorted(part for process in parts for part in process[2 * step : 2 * step + 2])
        assert held == [[2 * i, *batch["label"][2 * i : 2 * i + 2].tolist()] for i in range(4)]


def test_nothing_heavy_is_imported(tmp_path):
    program = (
        "import sys, jaxnets.data; sys.exit(str({'grain', 'tensorflow_datasets', 'PIL'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "")
