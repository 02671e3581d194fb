"""Transformations of one image on the host: crops, flips and colours, each a pure function of (generator, image).

Images are uint8 ``[H, W, 3]`` in 0..255, and so are results: `to_float` puts them into data space on the device.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_TRIES = 10


class PixelPCA(NamedTuple):
    """Principal components of pixels in ``[0, 1]``: eigenvalues ``[3]`` and eigenvectors ``[3, 3]`` of the covariance.

    Eigenvalues fall; column ``k`` of the eigenvectors, over red, green and blue, belongs to eigenvalue ``k``.
    """

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray


IMAGENET_PCA = PixelPCA(
    np.array([0.2175, 0.0188, 0.0045]),
    np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]),
)
"""Of ImageNet's training pixels, as in the training of ResNets in Torch (fb.resnet.torch)."""


def pixel_pca(images: Iterable[np.ndarray]) -> PixelPCA:
    """Returns the principal components of all pixels of ``images``, uint8 ``[..., 3]``, read once.

    An image counts by its pixels. Raises ``ValueError`` for images that are not uint8 with three channels, or none.

    >>> pixel_pca([np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)]).eigenvalues.round(4).tolist()
    [0.25, 0.0, 0.0]
    """
    count, total, products = 0, np.zeros(3), np.zeros((3, 3))
    for image in images:
        _check_image(image)
        pixels = image.reshape(-1, 3).astype(np.float64)  # sums of bytes and of their products are exact below 2^53
        count, total, products = count + len(pixels), total + pixels.sum(0), products + pixels.T @ pixels
    if not count:
        raise ValueError("pixel_pca needs at least one pixel, got none")
    mean = total / count
    eigenvalues, eigenvectors = np.linalg.eigh((products / count - np.outer(mean, mean)) / 255**2)
    return PixelPCA(np.maximum(eigenvalues[::-1], 0), eigenvectors[:, ::-1])


def pca_lighting(
    rng: np.random.Generator, image: np.ndarray, *, pca: PixelPCA = IMAGENET_PCA, std: float = 0.1
) -> np.ndarray:
    """Returns ``image`` with ``255 * eigenvectors @ (alpha * eigenvalues)`` added to every pixel.

    ``alpha[3]`` is drawn from a normal distribution with mean 0 and standard deviation ``std``, once for the image. The
    sum is rounded to the nearest byte and clipped to 0..255, so that the image stays inside data space.

    Krizhevsky, Sutskever, Hinton 2012, ImageNet classification with deep convolutional neural networks, section 4.1.
    """
    _check_image(image)
    alpha = rng.normal(0, std, 3)
    shift = 255 * pca.eigenvectors @ (alpha * pca.eigenvalues)
    levels = np.arange(256)[:, None] + shift  # each channel has 256 cases: to look them up is six times as fast
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.stack([table[:, channel][image[..., channel]] for channel in range(3)], axis=-1)


def horizontal_flip(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Returns ``image`` mirrored left to right with probability 1/2, otherwise as it is."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_resized_crop(
    rng: np.random.Generator,
    image: np.ndarray,
    *,
    size: int = 224,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Returns a random part of ``image``, resized to ``[size, size, 3]`` by antialiased bilinear interpolation.

    The part has a share of the area drawn uniformly from ``area`` and a ratio of width to height drawn log-uniformly
    from ``aspect``, and lies anywhere inside. After ten draws that do not fit, it is the largest central part whose
    ratio is within ``aspect``.

    Szegedy et al. 2015, Going deeper with convolutions, section 6; ten tries as in torchvision.
    """
    _check_image(image)
    top, left, height, width = _crop_box(rng, image.shape[0], image.shape[1], area, aspect)
    return _resize(image[top : top + height, left : left + width], size, size)


def _crop_box(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the part."""
    for _ in range(_TRIES):
        pixels = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, max(1, round(width / aspect[0])))
    w = min(width, max(1, round(height * aspect[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_and_center_crop(image: np.ndarray, *, size: int = 224, shorter_side: int = 256) -> np.ndarray:
    """Returns the central ``[size, size, 3]`` of ``image``, its shorter side resized to ``shorter_side`` pixels.

    Raises ``ValueError`` where ``size`` is not in ``1..shorter_side``.
    """
    _check_image(image)
    if not 1 <= size <= shorter_side:
        raise ValueError(f"size must be in 1..shorter_side, got size {size} and shorter_side {shorter_side}")
    height, width = (side * shorter_side // min(image.shape[:2]) for side in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    return _resize(image, height, width)[top : top + size, left : left + size]


def augment(
    rng: np.random.Generator, image: np.ndarray, *, size: int = 224, pca: PixelPCA = IMAGENET_PCA
) -> np.ndarray:
    """Returns what a network trains on: `random_resized_crop`, then `horizontal_flip`, then `pca_lighting`."""
    return pca_lighting(rng, horizontal_flip(rng, random_resized_crop(rng, image, size=size)), pca=pca)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"an image must be uint8 with three channels, got {image.dtype} of shape {image.shape}")
