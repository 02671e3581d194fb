"""Attacks over any number of rows, from the host: batches of a few fixed sizes, spread over all devices."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxnets import parallel
from jaxnets.attacks.parts.calling import as_pytree, checked_logits, row_keys
from jaxnets.attacks.parts.queries import with_queries
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import is_right
from jaxnets.threats import Threat
from jaxnets.types import Array, Attack, LogitsFn

_JUDGED = 2**31
"""The step whose draw judges results: no attack has one of this number, and so has not seen it."""


class Attacked(NamedTuple):
    """``x[N, ...]``, whether each row is classified as its target ``[N]``, and its queries ``[N]`` where counted."""

    x: np.ndarray
    correct: np.ndarray
    queries: np.ndarray | None


class HostKeys(NamedTuple):
    """Keys of rows in numpy, where taking some of them compiles nothing: ``data[N, ...]``."""

    data: np.ndarray
    impl: Any

    def __getitem__(self, rows: np.ndarray) -> "HostKeys":
        return HostKeys(self.data[rows], self.impl)

    def wrapped(self) -> Array:
        return jax.random.wrap_key_data(jnp.asarray(self.data), impl=self.impl)


def checked_data(name: str, x: Any, threat: Threat) -> np.ndarray:
    """The rows ``[N, ...]`` in the type that devices hold them in: casting later would move every coordinate.

    Raises:
      ValueError: unless they are in single or double precision, inside the threat's box, and of one epsilon.
    """
    x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    if np.ndim(threat.epsilon) != 0:
        raise ValueError(
            f"{name} gathers rows into batches of its own: it takes one epsilon for all, got {np.shape(threat.epsilon)}"
        )
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{name} takes rows in single or double precision, got {x.dtype}, in which perturbations are rounded out "
            "of their ball: it is the network that may compute in less"
        )
    if not ((x >= threat.lower) & (x <= threat.upper)).all():
        raise ValueError(
            f"{name} takes rows inside the threat's box [{threat.lower}, {threat.upper}], got values from "
            f"{np.min(x)} to {np.max(x)}: scale the data, or give the threat its lower and upper"
        )
    return x


def host_keys(key: Array, rows: int) -> HostKeys:
    """The keys of `row_keys`."""
    keys = row_keys(key, rows)
    return HostKeys(np.asarray(jax.random.key_data(keys)), jax.random.key_impl(keys))


def attack_rows(
    attack: Attack | None,
    keys: HostKeys,
    logits_fn: LogitsFn,
    x: np.ndarray,
    target: Any,
    *,
    number: int = 0,
    batch_size: int | None,
    mesh: Mesh,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Attacked:
    """Runs an attack on all rows, ``batch_size`` at once, and classifies what it returns.

    What is left at the end comes in batches of one smaller size, a quarter or a sixteenth, where a whole one would be
    mostly padding: an attack is compiled for at most two sizes, and in all calls together for three.

    Args:
      attack: None for none.
      keys: one a row.
      number: folded into the keys; 0, 1, ... for attacks that are to draw differently.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: rows ``[N, ...]``.
      target: classes ``[N]``, a list of them too.
      batch_size: rows at once, rounded up to a multiple of the devices; `parallel.rows_at_once` if None.
      mesh: of devices.
      on_rows: told how many rows were done, after each batch.

    Raises:
      ValueError: for a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 row, or None, got {batch_size}")
    sharding, counting = parallel.by_rows(mesh), attack and with_queries(attack)
    logits_fn = parallel.replicate(as_pytree(logits_fn), mesh)
    found, target, correct = np.array(x), np.asarray(target), np.zeros(len(x), bool)
    queries = np.zeros(len(x), np.int64) if counting else None
    for rows, valid in _batches(len(x), batch_size or parallel.rows_at_once(), mesh.size):
        x_batch, target_batch, data = jax.device_put((x[rows], target[rows], keys.data[rows]), sharding)
        keys_batch = _wrap(data, number, impl=keys.impl)
        if counting:
            x_adv, asked = counting(keys_batch, logits_fn, x_batch, target_batch)
            queries[rows[:valid]] = np.asarray(asked)[:valid]  # pyright: ignore
        else:
            x_adv = attack(keys_batch, logits_fn, x_batch, target_batch) if attack else x_batch
        found[rows[:valid]] = np.asarray(x_adv)[:valid]
        correct[rows[:valid]] = np.asarray(_correct(keys_batch, logits_fn, x_adv, target_batch))[:valid]
        on_rows(valid)
    return Attacked(found, correct, queries)


def _batches(n: int, batch_size: int, devices: int) -> Iterator[tuple[np.ndarray, int]]:
    """``(rows, valid)``: as `data.padded_batches`, with smaller batches at the end where one would be mostly padding.

    >>> [(len(rows), valid) for rows, valid in _batches(79, 32, 1)]
    [(32, 32), (32, 32), (8, 8), (8, 7)]
    """
    sizes = [-(-size // devices) * devices for size in (batch_size, batch_size // 4, batch_size // 16) if size]
    tail = n % sizes[0]
    last = next((size for size in sizes if -tail % size <= tail), sizes[-1])
    whole = [(start, sizes[0]) for start in range(0, n - tail, sizes[0])]
    for start, size in [*whole, *((start, last) for start in range(n - tail, n, last))]:
        yield np.minimum(np.arange(start, start + size), n - 1), min(size, n - start)


@partial(jax.jit, static_argnames="impl")
def _wrap(data: Array, number: Array, *, impl: Any) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(jax.random.wrap_key_data(data, impl=impl), number)


@jax.jit
def _correct(keys: Array, logits_fn: Any, x: Array, y: Array) -> Array:
    return is_right(checked_logits(redrawn(logits_fn, keys, _JUDGED)(x), x), y)
