"""A PyTorch ``state_dict``, read from a file or taken as it is: names and arrays, without what wraps them."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

# Counters that momentum makes needless, and a group of layers that the wide networks of TRADES have and never call.
_UNUSED = re.compile(r"(^|\.)num_batches_tracked$|^sub_block1\.")

_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""What `DataParallel`, `torch.compile` and modules of one network put before every name."""


def read_state(source: str | Path | Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file, or of a ``state_dict``, by their names.

    A ``state_dict`` that is the only one in a checkpoint is found there.

    Raises:
      ValueError: for a file of another kind, a damaged one, one with no ``state_dict`` or several, or tensors that are
        no dense arrays.
      ImportError: where the file needs PyTorch, which is not installed.
    """
    content = source if isinstance(source, Mapping) else _READERS[_suffix(Path(source))](Path(source))
    where = "this mapping" if isinstance(source, Mapping) else str(source)
    state = _unwrap(_find_state(content, where))
    return {name: _to_numpy(name, value) for name, value in state.items() if not _UNUSED.search(name)}


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """All arrays of a file.

    Raises:
      ValueError: for a damaged one, or one with a dtype that NumPy lacks.
    """
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): get it again") from error
    except AttributeError as error:  # how safetensors says that it found no such dtype
        raise ValueError(f"{file} holds arrays that NumPy cannot ({error}): save them anew in float32") from error


def import_extra(package: str, purpose: str, install: str) -> ModuleType:
    """Imports what not everyone needs.

    Raises:
      ImportError: where it is not installed, with what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} takes {package}, which is not installed: pip install {install}") from error


def _read_pytorch(file: Path) -> Any:
    torch = import_extra("torch", f"reading {file}", "torch")
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # of many kinds, by how a file is damaged
        raise ValueError(
            f"{file} cannot be read as tensors alone, and nothing else is unpickled ({_first_line(error)}): "
            "get it again, or save it anew by torch.save(model.state_dict(), file)"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_READERS = {".pth": _read_pytorch, ".pt": _read_pytorch, ".safetensors": read_safetensors}


def _suffix(file: Path) -> str:
    if file.suffix not in _READERS:
        raise ValueError(f"weights are read from files {', '.join(_READERS)}, got {file}")
    return file.suffix


def _find_state(content: Any, where: str) -> Mapping[str, Any]:
    if _is_state(content):
        return content
    entries = content if isinstance(content, Mapping) else {}
    states = [name for name, value in entries.items() if _is_state(value)]
    if len(states) != 1:
        found = f"several ({', '.join(map(str, states))}): pass one of them" if states else "none"
        raise ValueError(f"{where} should hold one state_dict, names and tensors; found {found}")
    return entries[states[0]]


def _to_numpy(name: str, tensor: Any) -> np.ndarray:
    """A tensor of PyTorch or an array as NumPy's; half precision of PyTorch becomes single."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    try:
        tensor = tensor.detach().cpu()
        # Exact, and NumPy knows no bfloat16 of PyTorch.
        return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} is no dense tensor with data ({_first_line(error)}): dequantize it, make it dense, or load its "
            "data first"
        ) from error


def _is_state(content: Any) -> bool:
    """Whether it is names and arrays, and nothing else."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and hasattr(value, "shape") for name, value in content.items())


def _unwrap(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without wrappers that all names begin with."""
    for wrapper in _WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return _unwrap({name.removeprefix(wrapper): value for name, value in state.items()})
    return state
