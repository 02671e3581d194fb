"""Data: loading, preparing, the errors of both, and batches. Real files are used where JAXNETS_DATA names them."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import data
from jaxnets.data import batches, originals, prepare

REAL = os.environ.get("JAXNETS_DATA")
MNIST_FILES = [f"{p}-{k}-ubyte.gz" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
TRAIN_ROWS, TEST_ROWS = 23, 11


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """Every test writes under its tmp_path alone, and none reaches a network."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)

    def refuse(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def idx(array):
    """The idx form of a uint8 array, gzipped."""
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.tobytes(), mtime=0)


def register(monkeypatch, files):
    """Makes ``files``, contents by name, the registered originals."""
    listed = tuple(
        originals.Original(name, f"http://example.invalid/{name}", len(c), hashlib.sha256(c).hexdigest())
        for name, c in files.items()
    )
    monkeypatch.setattr(prepare, "registered", lambda name: listed)
    return listed


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = ((TRAIN_ROWS, 28, 28), (TRAIN_ROWS,), (TEST_ROWS, 28, 28), (TEST_ROWS,))
    return [rng.integers(0, 256 if len(s) == 3 else 10, s).astype(np.uint8) for s in shapes]


@pytest.fixture
def mnist_files(arrays, monkeypatch):
    """Tiny files in MNIST's form, registered in place of the real ones."""
    files = dict(zip(MNIST_FILES, map(idx, arrays), strict=True))
    register(monkeypatch, files)
    return files


def pairs(split):
    return sorted((image.tobytes(), int(label)) for image, label in zip(*split, strict=True))


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Loading and preparing


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="unknown data set 'imagenet': choose one of digits, mnist"):
        data.load("imagenet")


def test_digits():
    digits = data.load("digits")
    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert set(np.unique(digits.train.images)) == {round(v * 255 / 16) for v in range(17)}
    counts = np.bincount(digits.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    np.testing.assert_array_equal(digits.test.labels, data.load("digits").test.labels)


def test_rows_held_out_are_not_trained_on():
    split = data.Split(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), np.arange(50, dtype=np.int32))
    rest, held_out = data.hold_out(split, 20, key=jax.random.key(1))
    assert (len(rest.labels), len(held_out.labels)) == (30, 20)
    assert sorted([*rest.labels, *held_out.labels]) == list(range(50))
    for part in (rest, held_out):
        np.testing.assert_array_equal(part.images.ravel(), part.labels)
        assert (np.diff(part.labels) > 0).all()
    np.testing.assert_array_equal(held_out.labels, data.hold_out(split, 20, key=jax.random.key(1))[1].labels)
    assert (held_out.labels != data.hold_out(split, 20, key=jax.random.key(2))[1].labels).any()
    for rows in (0, 50):
        with pytest.raises(ValueError, match=f"of 50 rows from 1 to 49 can be held out, got {rows}"):
            data.hold_out(split, rows, key=jax.random.key(1))
    with pytest.raises(ValueError, match="a split pairs images with labels, got 50 and 49"):
        data.hold_out(split._replace(labels=split.labels[:49]), 20, key=jax.random.key(1))


@pytest.mark.parametrize(
    ("name", "count"), [("mnist", 4), ("fashion_mnist", 4), ("cifar10", 1), ("cifar100", 1), ("svhn_cropped", 3)]
)
def test_registered_checksums_come_from_tfds(name, count):
    listed = originals.registered(name)
    assert len(listed) == count
    for original in listed:
        assert original.url.endswith(original.file)
        assert original.size > 1000
        assert len(bytes.fromhex(original.sha256)) == 32


@pytest.mark.parametrize("place", ["", "mnist", "downloads/manual", "downloads/manual/mnist"])
def test_prepares_originals_and_reads_them_back(place, arrays, mnist_files, tmp_path):
    write(tmp_path / "d" / place, mnist_files)
    first = data.load("mnist", tmp_path / "d")
    assert first.classes == tuple("0123456789")
    assert first.train.images.shape == (TRAIN_ROWS, 28, 28, 1)
    assert pairs(first.train) == pairs((arrays[0], arrays[1]))
    assert pairs(first.test) == pairs((arrays[2], arrays[3]))
    for file in mnist_files:
        (tmp_path / "d" / place / file).unlink()
    again = data.load("mnist", str(tmp_path / "d"))
    np.testing.assert_array_equal(first.train.images, again.train.images)
    np.testing.assert_array_equal(first.test.labels, again.test.labels)
    assert not [path for path in everything(tmp_path) if "incomplete" in path]


def test_stock_data_source_reads_what_was_prepared(mnist_files, tmp_path):
    import tensorflow_datasets as tfds

    write(tmp_path, mnist_files)
    loaded = data.load("mnist", tmp_path)
    source = tfds.data_source("mnist", data_dir=tmp_path, split="test", download=False)
    np.testing.assert_array_equal(np.stack([row["image"] for row in source]), loaded.test.images)
    assert [row["label"] for row in source] == loaded.test.labels.tolist()


def packed(folder, files):
    """A gzipped tar archive of ``files``, contents by name, in ``folder``."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, content_ in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content_)
            archive.addfile(member, io.BytesIO(content_))
    return content.getvalue()


def cifar_images(records, label_count):
    """The images of CIFAR's records, ``[N, 32, 32, 3]``, pixel by pixel."""
    at = [[[label_count + 1024 * c + 32 * i + j for c in range(3)] for j in range(32)] for i in range(32)]
    return records[:, np.array(at)]


def test_cifar10_planes_become_channels(monkeypatch, tmp_path):
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (6, 2, 3073)).astype(np.uint8)
    records[..., 0] %= 10
    files = {f"data_batch_{i + 1}.bin": records[i].tobytes() for i in range(5)}
    files |= {"test_batch.bin": records[5].tobytes(), "batches.meta.txt": "\n".join("abcdefghij").encode() + b"\n\n"}
    archive_file = {"cifar-10-binary.tar.gz": packed("cifar-10-batches-bin", files)}
    register(monkeypatch, archive_file)
    write(tmp_path / "cifar10", archive_file)
    loaded = data.load("cifar10", tmp_path)
    rows = records[:5].reshape(-1, 3073)
    assert loaded.classes == tuple("abcdefghij")
    assert pairs(loaded.train) == pairs((cifar_images(rows, 1), rows[:, 0]))


@pytest.fixture
def cifar100_files(monkeypatch):
    """Tiny files in CIFAR-100's form, and the records of its splits: coarse label, fine label, planes."""
    rng = np.random.default_rng(2)
    records = {split: rng.integers(0, 256, (n, 3074)).astype(np.uint8) for split, n in (("train", 7), ("test", 4))}
    for rows in records.values():
        rows[:, 0] %= 20
        rows[:, 1] %= 100
    files = {f"{split}.bin": rows.tobytes() for split, rows in records.items()}
    for kind, n in (("coarse", 20), ("fine", 100)):
        files[f"{kind}_label_names.txt"] = "".join(f"{kind}_{i}\n" for i in range(n)).encode()
    archive_file = {"cifar-100-binary.tar.gz": packed("cifar-100-binary", files)}
    register(monkeypatch, archive_file)
    return archive_file, records


def test_cifar100_has_fine_labels_and_keeps_the_coarse_ones(cifar100_files, tmp_path):
    import tensorflow_datasets as tfds

    files, records = cifar100_files
    write(tmp_path / "cifar100", files)
    loaded = data.load("cifar100", tmp_path)
    assert loaded.classes == tuple(f"fine_{i}" for i in range(100))
    for split, rows in records.items():
        images = cifar_images(rows, 2)
        assert pairs(getattr(loaded, split)) == pairs((images, rows[:, 1]))
        source = tfds.data_source("cifar100", data_dir=tmp_path, split=split, download=False)
        assert source.dataset_info.features["coarse_label"].int2str(3) == "coarse_3"
        for row in source:
            i = int(row["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(row["image"], images[i])
            assert (row["coarse_label"], row["label"]) == tuple(rows[i, :2])


@pytest.fixture
def svhn(monkeypatch):
    """Tiny files in SVHN's form, and their contents."""
    from scipy.io import savemat

    rng, files, contents = np.random.default_rng(3), {}, {}
    for split, n in (("train", 13), ("test", 5)):
        images = rng.integers(0, 256, (32, 32, 3, n)).astype(np.uint8)
        contents[split] = images, np.arange(1, n + 1).astype(np.uint8)[:, None] % 10 + 1
        buffer = io.BytesIO()
        savemat(buffer, {"X": images, "y": contents[split][1]}, do_compression=True)
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    register(monkeypatch, files | {"extra_32x32.mat": b"1.3 GB"})
    return files, contents


def test_svhn_calls_ten_zero_and_needs_no_extra_file(svhn, tmp_path):
    import tensorflow_datasets as tfds

    files, contents = svhn
    write(tmp_path / "svhn_cropped", files)
    loaded = data.load("svhn_cropped", tmp_path)
    assert loaded.classes == tuple("0123456789")
    for split, (images, labels) in contents.items():
        digits = [0 if label == 10 else int(label) for label in labels[:, 0]]
        rows = [images[..., i] for i in range(len(digits))]
        assert pairs(getattr(loaded, split)) == pairs((rows, digits))
        source = tfds.data_source("svhn_cropped", data_dir=tmp_path, split=split, download=False)
        assert {row["id"].decode(): row["label"] for row in source} == {
            f"{split}_{i:06d}": digit for i, digit in enumerate(digits)
        }


def test_not_a_file_of_svhn(svhn, tmp_path, monkeypatch):
    from scipy.io import savemat

    files, contents = svhn
    images, labels = contents["train"]
    for wrong in ({"X": images[:-1], "y": labels}, {"X": images, "y": labels - 1}, {"X": images, "y": labels[1:]}):
        buffer = io.BytesIO()
        savemat(buffer, wrong)
        changed = files | {"train_32x32.mat": buffer.getvalue()}
        register(monkeypatch, changed)
        write(tmp_path, changed)
        with pytest.raises(data.DataError, match=r"train_32x32\.mat is not a file of SVHN's cropped digits"):
            data.load("svhn_cropped", tmp_path)
        assert everything(tmp_path) == sorted(changed)


@pytest.mark.parametrize("name", ["cifar100", "svhn_cropped"])
def test_damaged_original_and_damaged_prepared_folder(name, cifar100_files, svhn, monkeypatch, tmp_path):
    files = cifar100_files[0] if name == "cifar100" else svhn[0]
    register(monkeypatch, files)
    harmed, good = next(iter(files.items()))
    write(tmp_path, files | {harmed: good[: len(good) // 2]})
    before = everything(tmp_path)
    with pytest.raises(data.DataError, match=f"{harmed} is not the registered file: expected {len(good)} bytes"):
        data.load(name, tmp_path)
    assert everything(tmp_path) == before
    write(tmp_path, files)
    data.load(name, tmp_path)
    (folder,) = (tmp_path / name).iterdir()
    _truncate(folder)
    with pytest.raises(data.DataError, match="Delete that folder and load again"):
        data.load(name, tmp_path)


def test_environment_names_the_folder(mnist_files, tmp_path, monkeypatch):
    write(tmp_path / "env", mnist_files)
    monkeypatch.setenv("JAXNETS_DATA", str(tmp_path / "env"))
    assert len(data.load("mnist").train.labels) == TRAIN_ROWS
    assert (tmp_path / "env" / "mnist" / "3.0.1").is_dir()
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_read_only_folder_stays_as_it_is(linked, mnist_files, tmp_path):
    folder = tmp_path / "read_only"
    write(folder / "mnist", mnist_files)
    (folder / "mnist").chmod(0o555)
    folder.chmod(0o555)
    given = folder
    if linked:  # a writable folder whose data set is a link to one that is not
        given = tmp_path / "links"
        given.mkdir()
        (given / "mnist").symlink_to(folder / "mnist")
    before = everything(folder)
    try:
        assert len(data.load("mnist", given).train.labels) == TRAIN_ROWS
        assert everything(folder) == before
        assert (tmp_path / "tfds" / "mnist" / "3.0.1").is_dir()
        assert len(data.load("mnist", given).test.labels) == TEST_ROWS
    finally:
        folder.chmod(0o755)
        (folder / "mnist").chmod(0o755)


def test_nowhere_to_write(mnist_files, tmp_path, monkeypatch):
    write(tmp_path / "read_only", mnist_files)
    (tmp_path / "read_only").chmod(0o555)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "read_only" / "tfds"))
    try:
        with pytest.raises(data.DataError, match="none of these folders can be written into"):
            data.load("mnist", tmp_path / "read_only")
    finally:
        (tmp_path / "read_only").chmod(0o755)


def test_downloads_what_is_missing(mnist_files, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(mnist_files[url.rsplit("/", 1)[-1]]))
    assert len(data.load("mnist", tmp_path / "d").train.labels) == TRAIN_ROWS
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["mnist"]
    assert [path.name for path in (tmp_path / "d" / "mnist").iterdir()] == ["3.0.1"]


def test_wrong_download_is_refused(mnist_files, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>not found</html>"))
    with pytest.raises(data.DataError, match="gave a file that is not the registered file: expected"):
        data.load("mnist", tmp_path / "d")
    assert everything(tmp_path / "d") == []


def test_missing_file_without_a_network(mnist_files, tmp_path):
    absent = MNIST_FILES[2]
    write(tmp_path / "d" / "mnist", {k: v for k, v in mnist_files.items() if k != absent})
    before = everything(tmp_path / "d")
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", tmp_path / "d")
    message = str(caught.value)
    for part in (absent, str(tmp_path / "d" / "mnist"), "SHA-256", "no network", "JAXNETS_DATA"):
        assert part in message
    assert MNIST_FILES[0] not in message
    assert everything(tmp_path / "d") == before


@pytest.mark.parametrize("harm", [lambda c: c[: len(c) // 2], lambda c: bytes((*c[:-1], c[-1] ^ 1)), lambda c: b""])
def test_truncated_or_altered_file(harm, mnist_files, tmp_path):
    harmed = MNIST_FILES[0]
    good = mnist_files[harmed]
    write(tmp_path / "d" / "mnist", mnist_files | {harmed: harm(good)})
    before = everything(tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", tmp_path / "d")
    message = str(caught.value)
    digests = [hashlib.sha256(content).hexdigest() for content in (good, harm(good))]
    for part in (str(tmp_path / "d" / "mnist" / harmed), *digests, f"{len(good)} bytes", "Replace it"):
        assert part in message
    assert everything(tmp_path) == before


def test_another_data_sets_file_is_passed_over(mnist_files, tmp_path):
    write(tmp_path, dict.fromkeys(mnist_files, b"another data set's"))
    write(tmp_path / "downloads" / "manual", mnist_files)
    assert len(data.load("mnist", tmp_path).train.labels) == TRAIN_ROWS


def test_failure_while_preparing_leaves_nothing(mnist_files, arrays, tmp_path, monkeypatch):
    files = mnist_files | {MNIST_FILES[1]: idx(arrays[1][:-1])}  # one label too few: found when rows are written
    register(monkeypatch, files)
    write(tmp_path / "d" / "mnist", files)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        data.load("mnist", tmp_path / "d")
    assert everything(tmp_path) == before


def test_not_an_idx_file(mnist_files, tmp_path, monkeypatch):
    files = mnist_files | {MNIST_FILES[1]: gzip.compress(b"\0\0\x08\x01\0\0\0\x09short")}
    register(monkeypatch, files)
    write(tmp_path, files)
    with pytest.raises(data.DataError, match=r"train-labels.* is not an idx file of bytes with 1 axes"):
        data.load("mnist", tmp_path)


def _truncate(folder):
    shard = next(folder.glob("*-train.array_record*"))
    os.truncate(shard, shard.stat().st_size // 2)


def _flip_a_byte(folder):
    shard = next(folder.glob("*-train.array_record*"))
    content = bytearray(shard.read_bytes())
    content[5000] ^= 0xFF
    shard.write_bytes(content)


def _remove(pattern):
    return lambda folder: next(folder.glob(pattern)).unlink()


def _empty(folder):
    for file in folder.iterdir():
        file.unlink()


def _call_it_tfrecord(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))


@pytest.mark.parametrize(
    "harm",
    [
        _truncate,
        _flip_a_byte,
        _remove("*-test.array_record*"),
        _remove("dataset_info.json"),
        _remove("features.json"),
        _empty,
        _call_it_tfrecord,
        lambda folder: (folder / "dataset_info.json").write_text("{"),
    ],
    ids=["truncated", "altered", "no shard", "no info", "no features", "empty", "tfrecord", "bad info"],
)
def test_damaged_prepared_folder(harm, mnist_files, tmp_path):
    write(tmp_path, mnist_files)
    data.load("mnist", tmp_path)
    folder = tmp_path / "mnist" / "3.0.1"
    harm(folder)
    with pytest.raises(data.DataError, match="Delete that folder and load again") as caught:
        data.load("mnist", tmp_path)
    assert str(folder) in str(caught.value)
    assert caught.value.__suppress_context__


def test_two_at_once(mnist_files, tmp_path):
    """The second finds the folder of the first when it is about to publish its own."""
    write(tmp_path / "files", mnist_files)
    roots = [tmp_path / "d", tmp_path / "files"]
    assert prepare.prepare("mnist", roots) == prepare.prepare("mnist", roots) == tmp_path / "d"
    assert [path.name for path in (tmp_path / "d" / "mnist").iterdir()] == ["3.0.1"]
    assert len(data.load("mnist", tmp_path / "d").train.labels) == TRAIN_ROWS


def test_nothing_heavy_is_imported_and_nothing_is_printed(mnist_files, tmp_path):
    """In a process of its own: what tensorflow-datasets says at its first use is said once."""
    write(tmp_path, mnist_files)
    data.load("mnist", tmp_path)
    program = f"""
import logging, sys
import jaxnets.data
heavy = {{"tensorflow_datasets", "grain", "sklearn", "PIL"}} & set(sys.modules)
jaxnets.data.load("mnist", {str(tmp_path)!r})
ok = not heavy and "tensorflow" not in sys.modules and not logging.root.handlers
sys.exit(0 if ok else f"{{heavy}} {{logging.root.handlers}}")
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_preparing_is_silent(mnist_files, tmp_path, capfd):
    write(tmp_path, mnist_files)
    data.load("mnist", tmp_path)
    assert capfd.readouterr() == ("", "")


# Real files


needs = pytest.mark.skipif(not REAL, reason="JAXNETS_DATA names no folder")


def real_folder(name):
    """The folder that has the real originals of ``name``; skips where there are none."""
    folder = Path(REAL or "") / name
    if not all((folder / file).is_file() for file in MNIST_FILES):
        pytest.skip(f"no original files in {folder}")
    return folder


@needs
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_files_are_the_registered_ones(name):
    folder = real_folder(name)
    assert [originals.find(o, [folder]) for o in originals.registered(name)] == [
        folder / o.file for o in originals.registered(name)
    ]


@needs
def test_real_mnist(tmp_path):
    import tensorflow_datasets as tfds

    folder = real_folder("mnist")
    (tmp_path / "d").mkdir()
    for file in MNIST_FILES:
        (tmp_path / "d" / file).symlink_to(folder / file)
    loaded = data.load("mnist", tmp_path / "d")
    assert loaded.train.images.shape == (60000, 28, 28, 1)
    assert loaded.test.images.shape == (10000, 28, 28, 1)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # published in LeCun et al.'s files
    assert np.bincount(loaded.train.labels).tolist() == counts
    published = prepare._parse_mnist({file: folder / file for file in MNIST_FILES})
    assert published.splits["train"].labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert pairs(loaded.test) == pairs(published.splits["test"][:2])
    assert pairs(loaded.train) == pairs(published.splits["train"][:2])
    source = tfds.data_source("mnist", data_dir=tmp_path / "d", split="train", download=False)
    assert len(source) == 60000
    rows = data.open_images("mnist", "train", tmp_path / "d")
    assert len(rows) == 60000
    for i in (0, 1, 59999):
        np.testing.assert_array_equal(source[i]["image"], loaded.train.images[i])
        np.testing.assert_array_equal(rows[i]["image"], loaded.train.images[i].repeat(3, -1))
        assert source[i]["label"] == rows[i]["label"] == loaded.train.labels[i]


@needs
def test_real_cifar10(tmp_path):
    folder = Path(REAL or "") / "cifar10"
    if not (folder / "3.0.2").is_dir() and not (folder / "cifar-10-binary.tar.gz").is_file():
        pytest.skip(f"neither a prepared folder nor the original file in {folder}")
    (tmp_path / "cifar10").symlink_to(folder)
    loaded = data.load("cifar10", tmp_path)
    assert " ".join(loaded.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert np.bincount(loaded.train.labels).tolist() == [5000] * 10
    assert np.bincount(loaded.test.labels).tolist() == [1000] * 10
    means = loaded.train.images.mean((0, 1, 2)) / 255  # 0.4914, 0.4822, 0.4465 in many published recipes
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-4)
    batches = data.training_batches(
        data.open_images("cifar10", "train", tmp_path), 64, seed=0, workers=1, transform=lambda rng, image: image
    )
    rows = set(pairs(loaded.train))
    for batch in (next(batches), next(batches)):
        assert set(pairs((batch["image"], batch["label"]))) <= rows
    batches.close()


@needs
def test_truncated_copy_of_a_real_file(tmp_path):
    folder, harmed = real_folder("mnist"), MNIST_FILES[0]
    write(tmp_path / "d", {file: (folder / file).read_bytes() for file in MNIST_FILES})
    os.truncate(tmp_path / "d" / harmed, 1_000_000)
    before = everything(tmp_path)
    with pytest.raises(data.DataError, match=r"expected 9912422 bytes .* got 1000000 bytes"):
        data.load("mnist", tmp_path / "d")
    assert everything(tmp_path) == before


# Batches


def test_steps_per_epoch():
    assert [data.steps_per_epoch(10, b) for b in (1, 3, 5, 10)] == [10, 3, 2, 1]
    for batch_size in (0, 11, -1):
        with pytest.raises(ValueError, match=r"1\.\.10"):
            data.steps_per_epoch(10, batch_size)


def test_epoch_order_is_the_stated_permutation():
    key = jax.random.key(3)
    for epoch in (0, 1, 7):
        order = data.epoch_order(key, epoch, 20)
        assert order.dtype == np.int32
        np.testing.assert_array_equal(order, jax.random.permutation(jax.random.fold_in(key, epoch), 20))
    assert not order.flags.writeable
    assert (data.epoch_order(key, 0, 20) != data.epoch_order(key, 1, 20)).any()
    assert (data.epoch_order(key, 0, 20) != data.epoch_order(jax.random.key(4), 0, 20)).any()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_raw_and_typed_keys_agree(impl):
    typed = jax.random.key(5, impl=impl)
    expected = jax.random.permutation(jax.random.fold_in(typed, 2), 50)
    np.testing.assert_array_equal(data.epoch_order(typed, 2, 50), expected)
    if impl == "threefry2x32":
        np.testing.assert_array_equal(data.epoch_order(jax.random.PRNGKey(5), 2, 50), expected)


def test_every_row_at_most_once_an_epoch_and_steps_in_any_order():
    key, n, size = jax.random.key(0), 23, 5
    forward = [data.batch_indices(key, step, n, size) for step in range(12)]
    for epoch in range(3):
        rows = np.concatenate(forward[4 * epoch : 4 * epoch + 4])
        assert len(set(rows.tolist())) == 20
        np.testing.assert_array_equal(rows, data.epoch_order(key, epoch, n)[:20])
    batches._cached_order.cache_clear()  # the cache must not matter: ask again, backwards
    for step in reversed(range(12)):
        np.testing.assert_array_equal(data.batch_indices(key, np.int64(step), n, size), forward[step])


def test_batch_indices_refuse_what_makes_no_sense():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="step must be 0 or more"):
        data.batch_indices(key, -1, 10, 2)
    with pytest.raises(ValueError, match="batch_size"):
        data.batch_indices(key, 0, 10, 11)
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        data.epoch_order(key, -1, 10)


def test_batches_from_several_threads():
    key = jax.random.key(9)
    expected = [data.batch_indices(key, step, 100, 10) for step in range(40)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda step: data.batch_indices(key, step, 100, 10), range(40)))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("n", "size"), [(10, 5), (10, 4), (3, 8), (1, 1)])
def test_padded_batches_cover_every_row_once(n, size):
    padded = list(data.padded_batches(n, size))
    assert all(rows.shape == (size,) and rows.dtype == np.int32 for rows, _ in padded)
    assert np.concatenate([rows[:valid] for rows, valid in padded]).tolist() == list(range(n))
    assert all((rows[valid:] == n - 1).all() for rows, valid in padded)
    with pytest.raises(ValueError, match="at least 1"):
        data.padded_batches(n, 0)


def test_to_float_is_exact_everywhere():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    exact = (images.astype(np.float64) / 255).astype(np.float32)
    for got in (data.to_float(images), data.to_float(jnp.asarray(images)), jax.jit(data.to_float)(images)):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, exact)
    with pytest.raises(ValueError, match="uint8"):
        data.to_float(exact)
