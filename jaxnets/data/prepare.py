"""Original files turned into what ``tensorflow_datasets.data_source`` reads, without TensorFlow.

The stock builders read their files through TensorFlow. Those here have the stock name, version and features, read the
files with numpy, and write array_record.
"""

import gzip
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jaxnets.data.originals import DataError, Original, download, find, places, quiet_tfds, registered

_LOG = logging.getLogger(__name__)
_IDX_BYTES = 0x08
_CIFAR_SHAPE = (3, 32, 32)
_SVHN_SHAPE = (32, 32, 3)
_LEFT_OUT = ("extra_32x32.mat",)  # 1.3 GB, which `load` has no split for


class Rows(NamedTuple):
    """One split as its original files have it: images uint8 ``[N, H, W, C]``, labels ``[N]``, and other features."""

    images: np.ndarray
    labels: np.ndarray
    others: Mapping[str, Sequence[Any]] = {}


class Parsed(NamedTuple):
    """The splits by name, and the class names by feature where the original files state them."""

    splits: dict[str, Rows]
    classes: Mapping[str, list[str]] = {}


def can_hold(root: Path, name: str) -> bool:
    """Says whether data set ``name`` may be written under ``root``: into ``root`` and, where it exists, ``root/name``.

    ``root/name`` may be a link to somewhere else, so that its own permissions count too.
    """
    return _writable(root) and _writable(root / name)


def _writable(folder: Path) -> bool:
    """Says whether ``folder``, or the nearest parent that exists, may be written into.

    The mode bits count as well as the system's answer: an administrator may write anywhere, and a folder without any
    write bit says that nobody should.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and bool(existing.stat().st_mode & 0o222) and os.access(existing, os.W_OK)


def prepare(name: str, roots: list[Path]) -> Path:
    """Prepares data set ``name`` under the first root that may be written into, and returns that root.

    Original files are taken from the roots where they are there, and otherwise downloaded; sizes and SHA-256 are
    checked first. The folder appears whole or not at all; where another process was quicker, its folder is kept.
    Raises `DataError` where a file is missing or altered, or no root is writable.
    """
    originals = [original for original in registered(name) if original.file not in _LEFT_OUT]
    folders = places(roots, name)
    found = {original: find(original, folders) for original in originals}
    missing = [original for original, path in found.items() if path is None]
    target = next((root for root in roots if can_hold(root, name)), None)
    if target is None:
        raise DataError(
            f"{name} has to be prepared once, and none of these folders can be written into: {_listed(roots)}. Name "
            "one that can by data_dir or the environment variable JAXNETS_DATA."
        )
    target.mkdir(parents=True, exist_ok=True)
    final_parent = target / name
    beside = final_parent if final_parent.exists() else target
    with tempfile.TemporaryDirectory(prefix=f"incomplete.{name}.", dir=beside) as scratch:
        fetched = _download_all(name, missing, folders, Path(scratch), final_parent)
        paths = {original.file: path for original, path in found.items() if path is not None} | fetched
        _LOG.info("preparing %s under %s: once, a minute or less", name, target)
        built = _build(name, _PARSERS[name](paths), Path(scratch))
        _publish(built, final_parent / built.name)
    return target


def _listed(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)


def _download_all(
    name: str, missing: list[Original], folders: list[Path], scratch: Path, home: Path
) -> dict[str, Path]:
    """Downloads into ``scratch``. Raises `DataError`, which says where files may be put: ``home``."""
    try:
        return {original.file: download(original, scratch) for original in missing}
    except DataError as error:
        files = ", ".join(str(original) for original in missing)
        raise DataError(
            f"{name} is not prepared and original files are missing: {files}. Looked in {_listed(folders)}. {error} "
            f"Put the files into {home}, or name a folder that has {name}, prepared or original, by data_dir or "
            "the environment variable JAXNETS_DATA."
        ) from None


def _publish(built: Path, final: Path) -> None:
    """Moves a prepared folder to its place in one step, or leaves the one that another process put there."""
    final.parent.mkdir(exist_ok=True)
    try:
        built.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _build(name: str, parsed: Parsed, scratch: Path) -> Path:
    """Writes ``parsed`` as array_record under ``scratch`` and returns the version's folder."""
    with quiet_tfds() as tfds:
        from tensorflow_datasets.core.registered import skip_registration

        stock: Any = tfds.builder_cls(name)
        with skip_registration():  # the stock builder keeps its name

            class Builder(stock):
                name = stock.name

                def _split_generators(self, dl_manager):
                    for feature, classes in parsed.classes.items():
                        self.info.features[feature].names = classes
                    return {split: self._generate_examples(rows) for split, rows in parsed.splits.items()}

                def _generate_examples(self, rows):
                    return _examples(rows)

        builder = Builder(data_dir=str(scratch), file_format="array_record")
        builder.download_and_prepare(download_dir=str(scratch / "downloads"))
        return Path(builder.data_path)


def _examples(rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields what a builder stores: each row's place as its key, and its features."""
    from PIL import Image

    for i, (pixels, label) in enumerate(zip(rows.images, rows.labels, strict=True)):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        yield i, {"image": image, "label": int(label)} | {name: values[i] for name, values in rows.others.items()}


def _parse_mnist(paths: Mapping[str, Path]) -> Parsed:
    splits = {
        split: Rows(
            _read_idx(paths[f"{prefix}-images-idx3-ubyte.gz"], 3)[..., None],
            _read_idx(paths[f"{prefix}-labels-idx1-ubyte.gz"], 1),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    return Parsed(splits)


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads a gzipped idx file: two zero bytes, a type code, the rank, big-endian sizes, then the values."""
    with gzip.open(path) as file:
        content = file.read()
    head = 4 + 4 * rank
    shape = np.frombuffer(content[4:head], ">u4").astype(int)
    if content[:4] != bytes((0, 0, _IDX_BYTES, rank)) or len(content) != head + shape.prod():
        raise DataError(f"{path} is not an idx file of bytes with {rank} axes.")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _parse_cifar10(paths: Mapping[str, Path]) -> Parsed:
    files = _read_tar(*paths.values())
    train = b"".join(files[f"data_batch_{i}.bin"] for i in range(1, 6))
    splits = {"train": train, "test": files["test_batch.bin"]}
    return _parse_cifar(splits, {"label": files["batches.meta.txt"]})


def _parse_cifar100(paths: Mapping[str, Path]) -> Parsed:
    files = _read_tar(*paths.values())
    names = {"coarse_label": files["coarse_label_names.txt"], "label": files["fine_label_names.txt"]}
    return _parse_cifar({split: files[f"{split}.bin"] for split in ("train", "test")}, names)


def _read_tar(path: Path) -> dict[str, bytes]:
    """Returns the contents of a tar archive by file name, without folders."""
    with tarfile.open(path) as archive:
        return {PurePosixPath(m.name).name: f.read() for m in archive if (f := archive.extractfile(m)) is not None}


def _parse_cifar(splits: Mapping[str, bytes], names: Mapping[str, bytes]) -> Parsed:
    """Reads CIFAR's records: a byte for each label in the order of ``names``, then red, green and blue planes."""
    rows = {split: _cifar_rows(content, split, list(names)) for split, content in splits.items()}
    return Parsed(rows, {label: text.decode().split() for label, text in names.items()})


def _cifar_rows(content: bytes, split: str, label_names: list[str]) -> Rows:
    records = np.frombuffer(content, np.uint8).reshape(-1, len(label_names) + int(np.prod(_CIFAR_SHAPE)))
    planes = records[:, len(label_names) :].reshape(-1, *_CIFAR_SHAPE)
    columns = {label: records[:, i].tolist() for i, label in enumerate(label_names)}
    ids = [f"{split}_{i:05d}" for i in range(len(records))]
    labels = np.array(columns.pop("label"))
    return Rows(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, columns | {"id": ids})


def _parse_svhn(paths: Mapping[str, Path]) -> Parsed:
    return Parsed({split: _svhn_rows(paths[f"{split}_32x32.mat"], split) for split in ("train", "test")})


def _svhn_rows(path: Path, split: str) -> Rows:
    """Reads SVHN's cropped digits: ``X`` uint8 ``[32, 32, 3, N]`` and ``y`` ``[N, 1]`` in 1..10, 10 for digit 0."""
    from scipy.io import loadmat

    content = loadmat(path, variable_names=("X", "y"))
    images, labels = content["X"], content["y"].reshape(-1)
    if images.shape != (*_SVHN_SHAPE, len(labels)) or labels.min() < 1 or labels.max() > 10:
        raise DataError(f"{path} is not a file of SVHN's cropped digits: X has shape {images.shape}, y {labels.shape}.")
    ids = [f"{split}_{i:06d}" for i in range(len(labels))]
    return Rows(np.ascontiguousarray(np.moveaxis(images, -1, 0)), labels % 10, {"id": ids})


_PARSERS: dict[str, Callable[[Mapping[str, Path]], Parsed]] = {
    "mnist": _parse_mnist,
    "fashion_mnist": _parse_mnist,
    "cifar10": _parse_cifar10,
    "cifar100": _parse_cifar100,
    "svhn_cropped": _parse_svhn,
}
