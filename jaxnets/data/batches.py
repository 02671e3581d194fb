"""Which rows a training step takes, as a pure function of (key, step), and rows as floats.

Everything here but `to_float` runs on the host: it makes the indices that rows are gathered with.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

_BYTE_AS_FLOAT = np.arange(256, dtype=np.float32) / np.float32(255)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Returns how many whole batches an epoch has: ``n // batch_size``.

    Raises ``ValueError`` where ``batch_size`` is not in ``1..n``.

    >>> steps_per_epoch(10, 3)
    3
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be in 1..{n} for {n} rows, got {batch_size}")
    return n // batch_size


def epoch_order(key: jax.Array, epoch: int, n: int) -> np.ndarray:
    """Returns the order of rows in one epoch, int32 ``[n]``: ``permutation(fold_in(key, epoch), n)``.

    ``key`` is a PRNG key, typed or raw; the order depends on nothing but it, ``epoch`` (0, 1, ...) and ``n``. The array
    is shared with later calls and so not writable. Raises ``ValueError`` where ``epoch < 0`` or ``n < 1``.

    >>> sorted(epoch_order(jax.random.key(0), 5, 4).tolist())
    [0, 1, 2, 3]
    """
    if epoch < 0 or n < 1:
        raise ValueError(f"epoch must be 0 or more and n at least 1, got epoch {epoch} and n {n}")
    data = np.asarray(jax.random.key_data(key))
    return _cached_order(data.tobytes(), data.shape, jax.random.key_impl(key), int(epoch), int(n))


@lru_cache(maxsize=8)
def _cached_order(data: bytes, shape: tuple[int, ...], impl, epoch: int, n: int) -> np.ndarray:
    key = jax.random.wrap_key_data(jnp.asarray(np.frombuffer(data, np.uint32).reshape(shape)), impl=impl)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), n), np.int32)
    order.setflags(write=False)  # one array serves every step of the epoch
    return order


def batch_indices(key: jax.Array, step: int, n: int, batch_size: int) -> np.ndarray:
    """Returns the rows of training step ``step``, int32 ``[batch_size]``.

    With ``s = steps_per_epoch(n, batch_size)``, step ``t`` takes the ``t % s``-th run of ``batch_size`` rows of
    ``epoch_order(key, t // s, n)``. A row comes at most once in an epoch. The ``n - s * batch_size`` rows at the end of
    an epoch's order, too few for a batch, are left out of that epoch: each epoch has another order, so that later ones
    take them. The first step of an epoch draws its order; the others take microseconds.

    Raises ``ValueError`` where ``step < 0`` or ``batch_size`` is not in ``1..n``.

    >>> key = jax.random.key(0)
    >>> sorted(np.concatenate([batch_indices(key, step, 4, 2) for step in (0, 1)]).tolist())
    [0, 1, 2, 3]
    """
    steps = steps_per_epoch(n, batch_size)
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    epoch, place = divmod(int(step), steps)
    return epoch_order(key, epoch, n)[place * batch_size : (place + 1) * batch_size]


def padded_batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields ``(indices, valid)`` over rows ``0..n-1`` in order: int32 ``[batch_size]``, how many of them count.

    All batches have one size, so that evaluation compiles once; the last is filled by repeating row ``n - 1``, and only
    its first ``valid`` rows count. ``batch_size`` may exceed ``n``. Raises ``ValueError`` where either is below 1.

    >>> [(rows.tolist(), valid) for rows, valid in padded_batches(5, 3)]
    [([0, 1, 2], 3), ([3, 4, 4], 2)]
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got n {n} and batch_size {batch_size}")
    return (
        (np.minimum(np.arange(start, start + batch_size, dtype=np.int32), n - 1), min(batch_size, n - start))
        for start in range(0, n, batch_size)
    )


@overload
def to_float(images: np.ndarray) -> np.ndarray: ...
@overload
def to_float(images: jax.Array) -> jax.Array: ...
def to_float(images):
    """Returns ``images / 255`` as float32 in ``[0, 1]``, for uint8 images of any shape.

    The result is the correctly rounded quotient, the same inside ``jit`` and outside, for numpy and JAX arrays alike.
    Raises ``ValueError`` where ``images`` is not uint8.

    >>> to_float(np.array([0, 51, 255], np.uint8)).tolist()
    [0.0, 0.20000000298023224, 1.0]
    """
    if images.dtype != np.uint8:
        raise ValueError(f"to_float takes uint8 images (0..255), got {images.dtype}")
    if isinstance(images, np.ndarray):
        return _BYTE_AS_FLOAT[images]
    # A table, because XLA turns division by a constant into multiplication by its reciprocal: inside jit, 126 of the
    # 256 values would differ from numpy's in the last bit.
    return jnp.asarray(_BYTE_AS_FLOAT)[images]
