"""Image classification data as arrays of bytes, and pure batching of their rows.

``load`` gives a whole data set, ``hold_out`` sets rows of it apart, ``batch_indices`` says which rows a training step
takes, ``to_float`` puts rows into data space. Of data sets too large for memory, ``open_images`` gives rows that are
decoded when asked for, ``training_batches`` and ``evaluation_batches`` what worker processes make of them, and
``prefetch_to_device`` puts that on the devices, where `random_crop`, `mixup` and the like change batches. Nothing heavy
is imported until one of these is called.
"""

from jaxnets.data.augmentation import Augmentation, cutmix, cutout, mixup, random_crop, random_flip
from jaxnets.data.batches import batch_indices, epoch_order, padded_batches, steps_per_epoch, to_float
from jaxnets.data.images import ImageRows, ImageSource, open_images
from jaxnets.data.originals import DataError
from jaxnets.data.sources import NAMES, Dataset, Split, hold_out, load
from jaxnets.data.streams import evaluation_batches, prefetch_to_device, training_batches
from jaxnets.data.transforms import (
    IMAGENET_PCA,
    PixelPCA,
    augment,
    horizontal_flip,
    pca_lighting,
    pixel_pca,
    random_resized_crop,
    resize_and_center_crop,
)

__all__ = [
    "IMAGENET_PCA",
    "NAMES",
    "Augmentation",
    "DataError",
    "Dataset",
    "ImageRows",
    "ImageSource",
    "PixelPCA",
    "Split",
    "augment",
    "batch_indices",
    "cutmix",
    "cutout",
    "epoch_order",
    "evaluation_batches",
    "hold_out",
    "horizontal_flip",
    "load",
    "mixup",
    "open_images",
    "padded_batches",
    "pca_lighting",
    "pixel_pca",
    "prefetch_to_device",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "resize_and_center_crop",
    "steps_per_epoch",
    "to_float",
    "training_batches",
]
