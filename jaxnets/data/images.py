"""Data sets too large for memory, opened for reading: an image is decoded when its row is asked for."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxnets.data.originals import DataError, quiet_tfds
from jaxnets.data.sources import folders


class ImageSource(Protocol):
    """Rows by index, ``{"image": uint8 [H, W, 3], "label": int}``: `ImageRows`, a list of such, or the like."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class ImageRows:
    """One split of a prepared data set, whose rows are read and decoded when they are asked for.

    ``rows[i]`` is ``{"image": uint8 [H, W, 3], "label": int32}``; grey images have three equal channels, and sizes
    differ from row to row where they do in the data set. ``classes`` are names by label. Raises `DataError` for a
    damaged row.
    """

    records: Any
    classes: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        from PIL import Image

        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}, got {index}")
        try:
            record = self.records[index]
            with Image.open(io.BytesIO(record["image"])) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # whatever the readers raise on bad bytes: RuntimeError, OSError, SyntaxError, ...
            raise DataError(
                f"row {index} of {self.origin} cannot be read ({_reason(error)}). Prepare that folder anew."
            ) from None
        return {"image": pixels, "label": np.asarray(record["label"], np.int32)}


def open_images(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> ImageRows:
    """Opens a split of an image classification data set of tensorflow-datasets that was prepared as array_record.

    ``name`` is a data set, with its configuration if it has several, such as ``imagenet2012`` or
    ``imagenette/160px-v2``; ``split`` is ``train``, ``validation``, ``test``, or a part such as ``train[:10%]``.
    ``data_dir`` has the meaning that it has for `load`. Nothing is downloaded or prepared: tensorflow-datasets does
    that for these data sets, and needs TensorFlow for it; reading does not.

    Raises ``ValueError`` for an unknown name or one that is no image classification, and `DataError` where the split is
    not there or damaged.
    """
    with quiet_tfds() as tfds:
        roots = folders(name.partition("/")[0], data_dir)
        builders = [_builder(tfds, name, root) for root in roots]
        builder = next((builder for builder in builders if builder.data_path.exists()), builders[0])
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
            raise ValueError(f"{name} is no image classification: its features are {', '.join(features)}")
        try:
            records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # ValueError, NotImplementedError, RuntimeError, ..., by what is wrong
            fault = f"has no split {split} of {name} that can be read as array_record ({_reason(error)})"
            fault = fault if builder.data_path.exists() else f"is not there: {name} is not prepared"
            raise DataError(f"{builder.data_path} {fault}. {_advice(name)}") from None
    return ImageRows(records, tuple(features["label"].names), f"split {split} of {builder.data_path}")


def _builder(tfds: Any, name: str, root: Path) -> Any:
    try:
        return tfds.builder(name, data_dir=str(root))
    except ValueError as error:
        raise ValueError(f"tensorflow-datasets has no data set {name!r} ({_reason(error)})") from None
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # a folder is there whose metadata cannot be read
        raise DataError(f"{root / name} cannot be read ({_reason(error)}). {_advice(name)}") from None


def _advice(name: str) -> str:
    return (
        "Put a folder there that has it as array_record, or name another data_dir. Where TensorFlow is installed, "
        f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare() makes one."
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
