"""A model as a folder that can be published: ``model.safetensors``, and ``config.json`` that says what it is."""

import json
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from jaxnets import __version__
from jaxnets.types import Params, Stats
from jaxnets.weights.fitting import check_fit
from jaxnets.weights.reading import import_extra, read_safetensors

FORMAT = 1

_ARRAYS, _CONFIG = "model.safetensors", "config.json"
_KEPT = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "bfloat16", "float16", "float32", "float64",
}  # fmt: skip


class Published(NamedTuple):
    """A model as it was saved: trees of NumPy arrays, and what the one who saved it said of it."""

    params: Params
    stats: Stats
    config: dict[str, Any]


def save(folder: str | Path, params: Params, stats: Stats, config: Mapping[str, Any]) -> None:
    """Writes a new folder, whole or not at all.

    With the model's name on the command line, the number of classes and the shape of an image in ``config``, as in
    ``{"model": "resnet18", "classes": 10, "image": [32, 32, 3]}``, the network can be built again.

    Args:
      folder: that is not there yet, or is empty.
      params, stats: nested dicts of arrays, as Flax has them.
      config: anything that JSON can hold.

    Raises:
      ValueError: where something is in the folder, or trees or configuration hold something else.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, {"Dense_0": {"bias": np.zeros(3)}}, {}, {"model": "mlp", "classes": 3})
    ...     load(folder)
    Published(params={'Dense_0': {'bias': array([0., 0., 0.])}}, stats={}, config={'model': 'mlp', 'classes': 3})
    """
    folder = Path(folder).absolute()
    check_unused(folder)
    arrays = _flat({"params": params, "stats": stats})
    text = _config_text(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        safetensors.numpy.save_file(arrays, draft / _ARRAYS)
        (draft / _CONFIG).write_text(text)
        # safetensors lets the owner alone read its files.
        (draft / _ARRAYS).chmod((draft / _CONFIG).stat().st_mode)
        draft.rename(folder)


def check_unused(folder: Path) -> None:
    """Whether `save` may write there: before the work that the weights take.

    Raises:
      ValueError: where something is in the folder.
    """
    is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if (folder.exists() or folder.is_symlink()) and not is_empty:
        raise ValueError(f"{folder} is there already: choose another folder, or delete it")


def load(folder: str | Path, like: tuple[Params, Stats] | None = None) -> Published:
    """Reads a folder that `save` wrote: the same trees, bit for bit. One from the hub is fetched first, by `fetch`.

    Args:
      folder: the folder.
      like: parameters and statistics, or their shapes, of the network that they are for.

    Raises:
      ValueError: where it is no such folder, is damaged or newer than this version; where names, shapes or dtypes are
        not those of ``like``, with all of them.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file() or not (folder / _ARRAYS).is_file():
        raise ValueError(
            f"{folder} holds no model: it lacks {_CONFIG} or {_ARRAYS}. A model from the Hugging Face hub is "
            'fetched first, load(fetch("user/repo")); a run of the command line is exported, jaxnets export RUN FOLDER'
        )
    config = _read_config(folder / _CONFIG)
    arrays = read_safetensors(folder / _ARRAYS)
    foreign = [name for name in arrays if not name.startswith(("params/", "stats/"))]
    if foreign:
        raise ValueError(
            f"{folder / _ARRAYS} is not of jaxnets: it holds {', '.join(foreign)}, not params and stats, whose names "
            "begin with params/ or stats/. Weights of PyTorch are read by from_torch"
        )
    if like is not None:
        wanted = _names({"params": like[0], "stats": like[1]})
        check_fit(_shapes(wanted), _shapes(arrays), str(folder))
        _check_dtypes(wanted, arrays, folder)
    tree = _nested(arrays, str(folder / _ARRAYS))
    return Published(tree.get("params", {}), tree.get("stats", {}), config)


def fetch(name: str, *, revision: str | None = None) -> Path:
    """The folder ``name`` where there is one, else the model ``user/repo`` of the Hugging Face hub, in its local cache.

    Args:
      name: of a folder, or of a repository on the hub.
      revision: a branch, tag or commit there; the main branch unless given.

    Raises:
      ImportError: where the extra ``hub`` is needed and not installed.
    """
    if Path(name).is_dir():
        return Path(name)
    hub = import_extra("huggingface_hub", f"{name} is no folder, and fetching it from the hub", '"jaxnets[hub]"')
    return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[_ARRAYS, _CONFIG]))


def _names(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, joined by slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in arrays.items()}


def _check_dtypes(wanted: Mapping[str, Any], there: Mapping[str, np.ndarray], folder: Path) -> None:
    differ = [name for name in wanted if wanted[name].dtype != there[name].dtype]
    if differ:
        said = ", ".join(f"{name} is {there[name].dtype}, the network takes {wanted[name].dtype}" for name in differ)
        raise ValueError(
            f"{folder} holds other dtypes: {said}. Load it without like, which gives them as they are, and convert them"
        )


def _flat(tree: Any) -> dict[str, np.ndarray]:
    # In C order, as safetensors writes the memory of an array without regard for its strides.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _names(tree).items()}
    other = sorted({str(array.dtype) for array in arrays.values()} - _KEPT)
    if other:
        raise ValueError(f"arrays of these dtypes cannot be saved: {', '.join(other)}; take one of {sorted(_KEPT)}")
    again = {"params": {}, "stats": {}} | _nested(arrays, "the tree")
    dicts = all(isinstance(part, dict) for part in tree.values())
    if not dicts or jax.tree.structure(again) != jax.tree.structure(tree):
        raise ValueError(
            "only nested dicts of arrays can be saved, none of them empty, with names that have no '/': got "
            f"{jax.tree.structure(tree)}"
        )
    return arrays


def _nested(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Dicts in dicts, by the slashes in names."""
    paths = {name: name.split("/") for name in arrays}
    inner = {"/".join(path[:depth]) for path in paths.values() for depth in range(1, len(path))}
    both = sorted(inner & arrays.keys())
    if both:
        raise ValueError(
            f"{where} has arrays by the names {', '.join(both)}, and arrays whose names go on from there after a '/': "
            "save nested dicts, with names that have no '/'"
        )
    tree: dict[str, Any] = {}
    for name, (*folders, leaf) in paths.items():
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = arrays[name]
    return tree


def _config_text(config: Mapping[str, Any]) -> str:
    packages = ("jax", "flax", "numpy", "safetensors")
    versions = {"jaxnets": __version__, **{name: metadata.version(name) for name in packages}}
    about = {"format": FORMAT, "versions": versions, "config": dict(config)}
    try:
        text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be what JSON can hold: {error}") from error
    if json.loads(text) != about:
        raise ValueError(f"config would not be the same again: names must be strings and lists no tuples, got {config}")
    return text


def _read_config(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        number, config = about["format"], about["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not of jaxnets ({error!r}): get it again") from error
    if number != FORMAT:
        raise ValueError(f"{file} is of format {number!r}, this version reads {FORMAT}: take another jaxnets")
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged or not of jaxnets: its config should be an object, got {config!r}")
    return config
