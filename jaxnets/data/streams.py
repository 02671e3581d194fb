"""Batches of data sets too large for memory: made by worker processes, put on the devices ahead of their use.

The order of rows and every draw are functions of (seed, position): neither the number of workers nor of processes, nor
where a run was stopped, changes a batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxnets.data.batches import steps_per_epoch
from jaxnets.data.images import ImageSource
from jaxnets.data.transforms import augment, resize_and_center_crop

_BATCHES_AHEAD = 2
"""In each worker, made by as many threads: decoding releases the interpreter's lock."""


def training_batches(
    rows: ImageSource,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    transform: Callable[[np.random.Generator, np.ndarray], np.ndarray] = augment,
    workers: int = 4,
    shard: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns the endless iterator over ``{"image": uint8 [b, H, W, 3], "label": int32 [b]}`` from step ``start`` on.

    ``batch_size`` counts rows over all processes. ``shard``, ``(index, count)`` of this process and by default JAX's,
    takes the ``index``-th run of ``b = batch_size / count`` rows of each batch. With
    ``s = steps_per_epoch(len(rows), batch_size)``, step ``t`` takes the ``t % s``-th run of ``batch_size`` rows of a
    permutation that ``(seed, t // s)`` gives; the rows at its end, too few for a batch, are left out of that epoch.

    ``transform`` maps ``(generator, image)`` to an image of one shape for all rows, by default `augment`; its generator
    depends on ``seed``, epoch and place in the permutation alone. ``workers`` processes, spawned at the first ``next``,
    read, decode and transform; 0 does so in threads of this process. A script whose workers are to be spawned needs
    ``if __name__ == "__main__":`` around what it does. Batches come through shared memory, which has to hold a few
    for each worker. The iterator is grain's: ``get_state`` and ``set_state`` resume it as ``start`` does, and ``close``
    ends the processes.

    Raises ``ValueError`` for numbers that make no sense, and `DataError` from ``next`` for a damaged row.
    """
    import grain

    index, count = _check_shard(batch_size, shard)
    used = steps_per_epoch(len(rows), batch_size) * batch_size
    if not 0 <= seed < 2**32 or start < 0:
        raise ValueError(f"seed must be in 0..{2**32 - 1} and start 0 or more, got seed {seed} and start {start}")
    order = grain.MapDataset.source(rows).seed(int(seed)).shuffle()  # pyright: ignore
    # Draws are made by place in the whole order, before anything is left out: sharding and starting later keep them.
    views = order.random_map(partial(_training_row, transform=transform))[:used]
    steps = views.batch(batch_size // count)[index::count].repeat()
    return _iterate(steps[int(start) :], workers)


def evaluation_batches(
    rows: ImageSource,
    batch_size: int,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = resize_and_center_crop,
    workers: int = 4,
    shard: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator over all rows in order, once: the keys of `training_batches` and ``"valid"``, bool ``[b]``.

    All batches have one size, in every process, so that evaluation compiles once; the last is filled with rows from the
    first on, whose ``valid`` is False and which must not count. ``transform`` maps an image to one of one shape for all
    rows. The other arguments, and what is raised, are those of `training_batches`; ``batch_size`` may exceed the rows.
    """
    import grain

    index, count = _check_shard(batch_size, shard)
    if not len(rows):
        raise ValueError("evaluation needs at least one row, got none")
    padded = -(-len(rows) // batch_size) * batch_size
    endless = grain.MapDataset.source(rows).repeat()  # pyright: ignore
    views = endless.map_with_index(partial(_evaluation_row, n=len(rows), transform=transform))[:padded]
    return _iterate(views.batch(batch_size // count)[index::count], workers)


def _check_shard(batch_size: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    index, count = shard or (jax.process_index(), jax.process_count())
    if not 0 <= index < count or batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size must be a positive multiple of the number of processes, and shard an index below it: got "
            f"batch_size {batch_size}, index {index} of {count}"
        )
    return index, count


def _training_row(row: dict[str, np.ndarray], rng: np.random.Generator, *, transform) -> dict[str, np.ndarray]:
    return row | {"image": transform(rng, row["image"])}


def _evaluation_row(place: int, row: dict[str, np.ndarray], *, n: int, transform) -> dict[str, np.ndarray]:
    return row | {"image": transform(row["image"]), "valid": np.asarray(place < n)}


def _iterate(steps: Any, workers: int) -> Iterator[dict[str, np.ndarray]]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain 0.2.18 asks for a flag's value, also in programs that parse none
    ahead = grain.ReadOptions(num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD)
    return iter(steps.to_iter_dataset(ahead).mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


def prefetch_to_device(batches: Iterable[Any], sharding: jax.sharding.Sharding, *, size: int = 2) -> Iterator[Any]:
    """Returns an iterator over ``batches`` as arrays of ``sharding``, of which ``size`` are on their way ahead of use.

    A batch is a pytree of numpy arrays, whose rows are those of this process: each becomes part of one array over all
    processes. Copies run while the device computes. Raises ``ValueError`` where ``size < 1``, and what ``batches`` and
    JAX raise, for example for rows that do not divide over the devices.

    >>> sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> [batch.tolist() for batch in prefetch_to_device([np.array([1, 2]), np.array([3, 4])], sharding)]
    [[1, 2], [3, 4]]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return _prefetch(batches, sharding, size)


def _prefetch(batches: Iterable[Any], sharding: jax.sharding.Sharding, size: int) -> Iterator[Any]:
    ahead: deque[Any] = deque()
    for batch in batches:
        ahead.append(jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch))
        if len(ahead) > size:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()
