"""States of a run on disk, whole or not at all: saved by Orbax, each with a digest by which damage is seen."""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxnets.types import Array

_log = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save, and every damage that is reported here


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be read."""


class BusyError(RuntimeError):
    """Another process trains in the folder."""


class Checkpoints:
    """The newest ``keep`` states in ``folder``. A save is atomic: a process killed in one leaves those before.

    Args:
      folder: made where it is missing.
      keep: how many to hold; with two or more a damaged newest one costs only the steps since the one before.

    Raises:
      ValueError: for a path from which Orbax could not read what it wrote.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        # Orbax takes its files together by a pattern that begins with the path.
        if set(self.folder.as_posix()) & set("[]\\"):
            raise ValueError(f"checkpoints cannot be kept below {self.folder}: choose a folder without [, ] and \\")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        handlers: Any = {"state": ocp.StandardCheckpointHandler(), "digest": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, tree: Any) -> None:
        """Writes a pytree of arrays and PRNG keys, and returns when it is on disk; states of later steps go."""
        self._delete_after(step - 1)
        tree = _to_host(tree)
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), digest=ocp.args.JsonSave(_digest(tree)))
        )

    def newest(self) -> int | None:
        """The step of the newest state, whole or damaged; None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any | None:
        """The newest state that is whole, with the structure, dtypes and keys of ``like``; None where there is none.

        A damaged one is warned of and deleted, and the one before it is taken.

        Raises:
          CheckpointError: where there are checkpoints and none can be read, or one is of another network or optimizer.
        """
        problems, host = [], _to_host(like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._check_kind(step, host)
                tree = _from_host(self._read(step, host), like)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax raises many kinds for damaged files; none of them may end the search.
                problems.append(f"{self.folder / str(step)} ({_first_line(error)})")
                _log.warning("checkpoint %s is damaged: falling back to the one before", problems[-1])
                continue
            self._delete_after(step)
            return tree
        if problems:
            raise CheckpointError(
                f"no checkpoint can be read: {'; '.join(problems)}. Restore {self.folder}, or delete it to start again"
            )
        return None

    def _delete_after(self, step: int) -> None:
        later = [other for other in self._manager.all_steps() if other > step]
        for other in later:
            shutil.rmtree(self.folder / str(other), ignore_errors=True)
        if later:
            self._manager.reload()

    def _check_kind(self, step: int, like: Any) -> None:
        """Raises CheckpointError unless the state has the arrays of ``like``, of which Orbax checks the names alone."""
        metadata: Any = self._manager.item_metadata(step)["state"]
        saved = {leaf.name: _described(leaf) for leaf in jax.tree.leaves(metadata.tree)}
        dotted = partial(jax.tree_util.keystr, simple=True, separator=".")
        wanted = {dotted(path): _described(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{self.folder / str(step)} holds the state of another network or optimizer: {name} is "
                    f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here. Choose another folder"
                )

    def _read(self, step: int, like: Any) -> Any:
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(like), digest=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=parts)
        if _digest(restored["state"]) != restored["digest"]:
            raise ValueError("its contents do not match the digest saved with them")
        return restored["state"]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process: two that write there spoil each other's checkpoints and metrics.

    A process may hold it several times over.

    Raises:
      BusyError: where another process holds it. What a killed process held is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.absolute() / ".lock", blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BusyError(f"another process trains in {folder}: wait for it, or choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(tree: Any) -> Any:
    def held(leaf: Any) -> np.ndarray:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        # Orbax saves no array without entries.
        return array if array.size else np.zeros(1, array.dtype)

    return jax.tree.map(held, tree)


def _from_host(tree: Any, like: Any) -> Any:
    def revive(leaf: np.ndarray, model: Array):
        if _is_key(model):
            return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(model))
        return leaf if np.size(model) else np.zeros(np.shape(model), leaf.dtype)

    return jax.tree.map(revive, tree, like)


def _digest(tree: Any) -> dict[str, str]:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves."""
    sha = hashlib.sha256()
    for name, leaf in _named(tree):
        sha.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return {"sha256": sha.hexdigest()}


def _named(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), np.asarray(leaf)


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
