"""Image classification data as arrays of bytes, and pure batching of their rows.

``load`` gives a whole data set, ``batch_indices`` says which rows a training step takes, ``to_float`` puts rows into
data space. Nothing heavy is imported until ``load`` is called.
"""

from jaxnets.data.batches import batch_indices, epoch_order, padded_batches, steps_per_epoch, to_float
from jaxnets.data.originals import DataError
from jaxnets.data.sources import NAMES, Dataset, Split, load

__all__ = [
    "NAMES",
    "DataError",
    "Dataset",
    "Split",
    "batch_indices",
    "epoch_order",
    "load",
    "padded_batches",
    "steps_per_epoch",
    "to_float",
]
