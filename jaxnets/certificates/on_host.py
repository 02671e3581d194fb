"""Certificates of any number of rows, from the host: batches of one size, spread over all devices."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxnets import parallel
from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.certificates.rows import Certificate
from jaxnets.data import padded_batches
from jaxnets.types import LogitsFn


def certify_rows(
    certificate: Certificate,
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    *,
    batch_size: int | None,
    mesh: Mesh,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Whether each row is certified, bool ``[N]``, ``batch_size`` rows at once.

    Args:
      certificate: which.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: rows ``[N, ...]``.
      y: classes ``[N]``.
      batch_size: rounded up to a multiple of the devices; `parallel.rows_at_once` if None.
      mesh: of devices.
      on_rows: told how many rows were done, after each batch.
    """
    sharding, found = parallel.by_rows(mesh), np.zeros(len(x), bool)
    logits_fn = parallel.replicate(as_pytree(logits_fn), mesh)
    size = -(-(batch_size or parallel.rows_at_once()) // mesh.size) * mesh.size
    for rows, valid in padded_batches(len(x), size):
        held = certificate(logits_fn, *jax.device_put((x[rows], y[rows]), sharding))
        found[rows[:valid]] = np.asarray(held)[:valid]
        on_rows(valid)
    return found
