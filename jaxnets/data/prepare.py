"""Original files turned into what ``tensorflow_datasets.data_source`` reads, without TensorFlow.

The stock builders read their files through TensorFlow. Those here have the stock name, version and features, read the
files with numpy, and write array_record.
"""

import gzip
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jaxnets.data.originals import DataError, Original, download, find, places, quiet_tfds, registered

_LOG = logging.getLogger(__name__)
_IDX_BYTES = 0x08
_CIFAR_SHAPE = (3, 32, 32)


class Rows(NamedTuple):
    """One split as its original files have it: images uint8 ``[N, H, W, C]``, labels ``[N]``, ids or none."""

    images: np.ndarray
    labels: np.ndarray
    ids: list[str] | None = None


class Parsed(NamedTuple):
    """The splits by name, and the class names where the original files state them."""

    splits: dict[str, Rows]
    classes: list[str] | None = None


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
    originals, folders = registered(name), places(roots, name)
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
                    if parsed.classes is not None:
                        self.info.features["label"].names = parsed.classes
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
        row = {"image": image, "label": int(label)}
        yield i, row if rows.ids is None else row | {"id": rows.ids[i]}


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
    (path,) = paths.values()
    with tarfile.open(path) as archive:
        files = {PurePosixPath(m.name).name: f.read() for m in archive if (f := archive.extractfile(m)) is not None}
    train = b"".join(files[f"data_batch_{i}.bin"] for i in range(1, 6))
    classes = files["batches.meta.txt"].decode().split()
    return Parsed({"train": _cifar_rows(train, "train"), "test": _cifar_rows(files["test_batch.bin"], "test")}, classes)


def _cifar_rows(content: bytes, split: str) -> Rows:
    """Reads CIFAR-10's records: a label byte, then the red, green and blue planes."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + int(np.prod(_CIFAR_SHAPE)))
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1))
    return Rows(images, records[:, 0], [f"{split}_{i:05d}" for i in range(len(records))])


_PARSERS: dict[str, Callable[[Mapping[str, Path]], Parsed]] = {
    "mnist": _parse_mnist,
    "fashion_mnist": _parse_mnist,
    "cifar10": _parse_cifar10,
}
