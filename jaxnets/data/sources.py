"""Whole data sets as arrays of bytes: scikit-learn's digits, and MNIST, its likes, CIFAR and SVHN through TFDS."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnets.data.originals import DataError, quiet_tfds
from jaxnets.data.prepare import can_hold, prepare

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")
"""The data sets that `load` knows."""

_DIGITS_TEST_ROWS = 360
_ROWS_AT_ONCE = 1000
_METADATA = {
    "mnist": ("dataset_info.json", "features.json"),  # its classes have numbers only
    "fashion_mnist": ("dataset_info.json", "features.json", "label.labels.txt"),
    "cifar10": ("dataset_info.json", "features.json", "label.labels.txt"),
    "cifar100": ("dataset_info.json", "features.json", "label.labels.txt"),
    "svhn_cropped": ("dataset_info.json", "features.json"),
}


class Split(NamedTuple):
    """Rows of a data set: ``images`` uint8 ``[N, H, W, C]`` in 0..255 and ``labels`` int32 ``[N]``, numpy arrays."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set: its name, the names of its classes by label, and the rows to train on and to test on."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split


def check_pairs(split: Split) -> None:
    """Raises ValueError unless there are as many labels as images."""
    if len(split.images) != len(split.labels):
        raise ValueError(f"a split pairs images with labels, got {len(split.images)} and {len(split.labels)}")


def hold_out(split: Split, rows: int, *, key: jax.Array) -> tuple[Split, Split]:
    """``rows`` rows drawn without replacement, and what is left: ``(rest, held_out)``, both in the split's order.

    Raises ``ValueError`` where ``rows`` is below 1, nothing is left, or images and labels are not as many.

    >>> split = Split(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5, dtype=np.int32))
    >>> rest, held_out = hold_out(split, 2, key=jax.random.key(0))
    >>> sorted([*rest.labels.tolist(), *held_out.labels.tolist()])
    [0, 1, 2, 3, 4]
    """
    check_pairs(split)
    count = len(split.labels)
    if not 1 <= rows < count:
        raise ValueError(f"of {count} rows from 1 to {count - 1} can be held out, got {rows}")
    is_held = np.zeros(count, bool)
    is_held[np.asarray(jax.random.permutation(key, count))[:rows]] = True
    rest, held_out = (Split(split.images[chosen], split.labels[chosen]) for chosen in (~is_held, is_held))
    return rest, held_out


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Returns data set ``name``, one of `NAMES`, decoded once into arrays.

    ``digits`` comes with scikit-learn: 1797 images of 8x8 pixels, whose values 0..16 become ``round(v * 255 / 16)``,
    half to even. It has no published split; 360 rows are set apart for testing by ``train_test_split`` with
    ``stratify=labels, random_state=0``.

    The others are read by ``tensorflow_datasets.data_source`` from ``data_dir``, in the order in which they are stored
    there: a fixed shuffle of the published order. Where they are not prepared, the original files are looked for in
    ``data_dir`` and ``data_dir/<name>``, otherwise downloaded, checked against the SHA-256 that tensorflow-datasets
    registers, and prepared once. A folder found prepared is taken as it is: its records carry their own checksums,
    which show damage and not where they came from. Labels of ``cifar100`` are the 100 fine ones; ``svhn_cropped`` is
    prepared without its 531131 extra rows.

    ``data_dir`` defaults to the environment variable ``JAXNETS_DATA``, then to tensorflow-datasets' own folder
    (``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``), which also takes the prepared form where ``data_dir`` is
    read-only.

    Raises ``ValueError`` for an unknown name and `DataError` where a file or a prepared folder is missing or damaged.

    >>> load("digits").train.images.shape
    (1437, 8, 8, 1)
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if name == "digits":
        return _digits()
    roots = folders(name, data_dir)
    with quiet_tfds() as tfds:
        version = str(tfds.builder_cls(name).VERSION)
    root = next((root for root in roots if (root / name / version).is_dir()), None)
    return _read(name, version, root or prepare(name, roots))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, targets = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int32)
    parts = train_test_split(np.arange(len(labels)), test_size=_DIGITS_TEST_ROWS, stratify=labels, random_state=0)
    train, test = (Split(images[rows], labels[rows]) for rows in parts)
    return Dataset("digits", tuple(str(digit) for digit in range(10)), train, test)


def folders(name: str, data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Returns the folders to look into: ``data_dir`` and, where that is read-only, tensorflow-datasets' own."""
    with quiet_tfds():
        from tensorflow_datasets.core.constants import get_default_data_dir

        own = Path(get_default_data_dir()).expanduser()
    chosen = Path(data_dir or os.environ.get("JAXNETS_DATA") or own).expanduser()
    return [chosen] if chosen == own or can_hold(chosen, name) else [chosen, own]


def _read(name: str, version: str, root: Path) -> Dataset:
    """Reads a prepared folder. Raises `DataError` where it is damaged."""
    folder = root / name / version
    try:
        with quiet_tfds() as tfds:
            absent = [file for file in _METADATA[name] if not (folder / file).is_file()]
            if absent:
                raise FileNotFoundError(f"no file {absent[0]}")
            train, test = tfds.data_source(
                f"{name}:{version}", data_dir=str(root), split=("train", "test"), download=False
            )
            classes = tuple(train.dataset_info.features["label"].names)
            return Dataset(name, classes, _decode(train, len(classes)), _decode(test, len(classes)))
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # whatever the readers raise on bad bytes: RuntimeError, ParseError, OSError, ...
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{folder} cannot be read as {name} in array_record form ({type(error).__name__}: {reason}). Delete that "
            "folder and load again, which prepares it anew, or name another data_dir."
        ) from None


def _decode(source: Any, class_count: int) -> Split:
    """Decodes every row of ``source`` in its order, and checks shapes and labels."""
    images = np.empty((len(source), *source.dataset_info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _ROWS_AT_ONCE):
        rows = source.__getitems__(list(range(start, min(start + _ROWS_AT_ONCE, len(source)))))
        for i, row in enumerate(rows, start):
            if row["image"].shape != images.shape[1:]:
                raise ValueError(f"image {i} has shape {row['image'].shape}, expected {images.shape[1:]}")
            images[i], labels[i] = row["image"], row["label"]
    if not len(labels) or labels.min() < 0 or labels.max() >= class_count:
        raise ValueError(f"expected rows with labels in 0..{class_count - 1}, got {np.unique(labels)[:20]}")
    return Split(images, labels)
