"""The original files of a data set: which are registered, where they lie, whether they are right.

What a file must be (its address, size and SHA-256) is read from the installed tensorflow-datasets.
"""

import contextlib
import hashlib
import io
import logging
import shutil
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

_LOG = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 30


class DataError(ValueError):
    """A data file or a prepared folder is missing, truncated or altered; the message says which and what to do."""


class Original(NamedTuple):
    """A file as its authors published it: name, address, bytes, and SHA-256 in hexadecimal."""

    file: str
    url: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.file} ({self.size} bytes, SHA-256 {self.sha256})"


@contextlib.contextmanager
def quiet_tfds() -> Iterator[Any]:
    """Gives the module tensorflow_datasets, silent within the context: no bars, log lines, prints or warnings."""
    absl, silent = logging.getLogger("absl"), logging.NullHandler()
    level = absl.level
    logging.root.addHandler(silent)  # absl calls basicConfig where the root logger has no handler, and that would stay
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import tensorflow_datasets as tfds
            from tensorflow_datasets.core.utils import tqdm_utils

            bars = tqdm_utils._active  # there is a public way to set this and none to read it
            absl.setLevel(logging.ERROR)
            tqdm_utils.display_progress_bar(False)
            try:
                yield tfds
            finally:
                tqdm_utils.display_progress_bar(bars)
    finally:
        absl.setLevel(level)
        logging.root.removeHandler(silent)


def registered(name: str) -> tuple[Original, ...]:
    """Returns the original files that tensorflow-datasets registers for its data set ``name``."""
    with quiet_tfds() as tfds:
        infos = tfds.builder_cls(name).url_infos
    return tuple(Original(url.rsplit("/", 1)[-1], url, int(i.size), i.checksum) for url, i in sorted(infos.items()))


def places(roots: Iterable[Path], name: str) -> list[Path]:
    """Returns the folders where original files of ``name`` are looked for, under each root, the likeliest first."""
    return [
        folder
        for root in roots
        for manual in (root / "downloads" / "manual",)
        for folder in (root / name, root, manual / name, manual)
    ]


def find(original: Original, folders: Sequence[Path]) -> Path | None:
    """Returns where ``original`` lies, its size and SHA-256 checked, or None where no folder has a file of its name.

    Several data sets use the same file names, so a file that differs is passed over where another is right. Raises
    `DataError` where there are only files that differ.
    """
    candidates = [folder / original.file for folder in folders if (folder / original.file).is_file()]
    faults = []
    for path in candidates:
        fault = _fault(path, original)
        if fault is None:
            return path
        faults.append(f"{path} {fault}")
    if faults:
        raise DataError(f"{faults[0]}. Replace it with the original, {original.url}, or remove it.")
    return None


def download(original: Original, folder: Path) -> Path:
    """Fetches ``original`` into ``folder``. Raises `DataError` where that fails or gives another file."""
    path = folder / original.file
    _LOG.info("downloading %s", original.url)
    try:
        with urllib.request.urlopen(original.url, timeout=_TIMEOUT_SECONDS) as response, path.open("wb") as out:
            shutil.copyfileobj(response, out)
    except (OSError, HTTPException) as error:
        raise DataError(f"Downloading {original.url} failed: {type(error).__name__}: {error}.") from None
    fault = _fault(path, original)
    if fault is not None:
        raise DataError(f"Downloading {original.url} gave a file that {fault}.")
    return path


def _fault(path: Path, original: Original) -> str | None:
    """Says how the file at ``path`` differs from ``original``, or None where it does not."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        return f"cannot be read: {type(error).__name__}: {error.strerror}"
    if (size, digest) == (original.size, original.sha256):
        return None
    expected = f"expected {original.size} bytes with SHA-256 {original.sha256}"
    return f"is not the registered file: {expected}, got {size} bytes with SHA-256 {digest}"
