"""Augmentation of batches on the device: crops, flips, holes, and rows mixed with one another.

Each is ``(key, batch) -> batch``, configured with `functools.partial`, for images ``[B, H, W, C]`` in data space.
`objectives.augmented` puts them before an objective. A row's crop, flip and hole depend on the key and its place in the
batch alone; mixtures take two rows by nature.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxnets.types import Array, Batch

Augmentation = Callable[[Array, Batch], Batch]
"""``(key, batch) -> batch``."""


def in_turn(augmentations: Sequence[Augmentation], key: Array, batch: Batch) -> Batch:
    """The batch as the augmentations leave it, one after the other, each with a key of its own."""
    for number, augment in enumerate(augmentations):
        batch = augment(jax.random.fold_in(key, number), batch)
    return batch


def random_crop(key: Array, batch: Batch, *, padding: int = 4) -> Batch:
    """Moves each image by up to ``padding`` pixels down or up and right or left; what comes into sight is 0.

    The augmentation of CIFAR-10 in He et al. 2016, https://arxiv.org/abs/1512.03385.

    >>> moved = random_crop(jax.random.key(0), Batch(jnp.ones((2, 3, 3, 1)), jnp.zeros(2, int)), padding=1)
    >>> moved.x.shape
    (2, 3, 3, 1)
    """
    _check_images("random_crop", batch.x)
    if padding < 0:
        raise ValueError(f"random_crop takes a padding of 0 or more pixels, got {padding}")

    def crop(key: Array, image: Array) -> Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)

    return batch._replace(x=_each_row(crop, key, batch.x))


def random_flip(key: Array, batch: Batch) -> Batch:
    """Mirrors each image, left for right, with probability one half.

    >>> image = jnp.array([[[[1.0], [2.0]]]])
    >>> flipped = [random_flip(jax.random.key(seed), Batch(image, jnp.zeros(1, int))).x.ravel() for seed in range(9)]
    >>> sorted({tuple(pixels.tolist()) for pixels in flipped})
    [(1.0, 2.0), (2.0, 1.0)]
    """
    _check_images("random_flip", batch.x)
    flip = lambda key, image: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)  # noqa: E731
    return batch._replace(x=_each_row(flip, key, batch.x))


def cutout(key: Array, batch: Batch, *, size: int = 16, fill: float | Array = 0.0) -> Batch:
    """Fills a square in each image, whose middle lies at any pixel: at the border a part of the square is cut off.

    Args:
      key: of the draws.
      batch: images ``[B, H, W, C]``.
      size: of the square's sides in pixels; 16 in the paper for CIFAR-10, 8 for CIFAR-100.
      fill: a number, or one a channel ``[C]``; the paper's is 0 behind normalisation, the mean of the data here.

    DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552.

    >>> holes = cutout(jax.random.key(0), Batch(jnp.ones((1, 4, 4, 1)), jnp.zeros(1, int)), size=1)
    >>> print(holes.x.sum())
    15.0
    """
    _check_images("cutout", batch.x)
    if size < 1:
        raise ValueError(f"cutout fills a square of at least one pixel, got size={size}")

    def cut(key: Array, image: Array) -> Array:
        middle = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2]))
        return jnp.where(_box(image.shape, middle - size // 2, size), jnp.asarray(fill, image.dtype), image)

    return batch._replace(x=_each_row(cut, key, batch.x))


def mixup(key: Array, batch: Batch, *, classes: int, alpha: float = 1.0) -> Batch:
    """Means of pairs of rows and of their labels: ``lam x_i + (1 - lam) x_j`` and ``lam y_i + (1 - lam) y_j``.

    As in the authors' program one ``lam``, from Beta(alpha, alpha), serves the whole batch, and ``j`` is a permutation.

    Args:
      key: of the draws.
      batch: rows ``[B, ...]`` of any shape; classes ``[B]`` or probabilities ``[B, K]``.
      classes: K; the labels of the result are probabilities ``[B, K]``.
      alpha: above 0; 1 in the paper for CIFAR-10, 0.2 for ImageNet.

    Zhang et al. 2018, https://arxiv.org/abs/1710.09412.

    >>> mixed = mixup(jax.random.key(0), Batch(jnp.eye(2), jnp.arange(2)), classes=2)
    >>> bool(jnp.allclose(mixed.x, mixed.y))
    True
    """
    _check_alpha("mixup", alpha)
    share_key, pair_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha, dtype=batch.x.dtype)
    others = jax.random.permutation(pair_key, len(batch.x))
    mix = lambda rows: share * rows + (1 - share) * rows[others]  # noqa: E731
    return Batch(mix(batch.x), mix(_probabilities(batch, classes)))


def cutmix(key: Array, batch: Batch, *, classes: int, alpha: float = 1.0) -> Batch:
    """Puts a rectangle of another row into each; labels are mixed by the areas.

    The rectangle has the image's proportions, the area ``1 - lam`` with ``lam`` from Beta(alpha, alpha), and its middle
    anywhere: what lies outside the image is cut off, and counted so. As in the authors' program one rectangle serves
    the whole batch.

    Args:
      key: of the draws.
      batch: images ``[B, H, W, C]``; classes ``[B]`` or probabilities ``[B, K]``.
      classes: K; the labels of the result are probabilities ``[B, K]``.
      alpha: above 0; 1 in the paper.

    Yun et al. 2019, https://arxiv.org/abs/1905.04899.

    >>> images = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))])
    >>> mixed = cutmix(jax.random.key(0), Batch(images, jnp.arange(2)), classes=2)
    >>> bool(jnp.allclose(mixed.x.mean((1, 2, 3)), mixed.y[:, 1]))
    True
    """
    _check_images("cutmix", batch.x)
    _check_alpha("cutmix", alpha)
    share_key, middle_key, pair_key = jax.random.split(key, 3)
    others = jax.random.permutation(pair_key, len(batch.x))
    sides = jnp.array(batch.x.shape[1:3])
    size = (jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha)) * sides).astype(int)
    middle = jax.random.randint(middle_key, (2,), 0, sides)
    box = _box(batch.x.shape[1:], middle - size // 2, size)
    y = _probabilities(batch, classes)
    share = jnp.mean(~box, dtype=y.dtype)
    return Batch(jnp.where(box, batch.x[others], batch.x), share * y + (1 - share) * y[others])


def _each_row(change: Callable[[Array, Array], Array], key: Array, x: Array) -> Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(x)))
    return jax.vmap(change)(keys, x)


def _box(image: tuple[int, ...], first: Array, size: int | Array) -> Array:
    """Which pixels, ``[H, W, 1]``, lie in a rectangle."""
    within = [(first[axis] <= (at := jnp.arange(image[axis]))) & (at < (first + size)[axis]) for axis in (0, 1)]
    return (within[0][:, None] & within[1])[..., None]


def _probabilities(batch: Batch, classes: int) -> Array:
    """The labels ``[B, K]``, in at least single precision: in less pixels cannot be counted. NaN without a class."""
    dtype = jnp.promote_types(batch.x.dtype, jnp.float32)
    if batch.y.ndim == 2 and batch.y.shape[1] != classes:
        raise ValueError(f"labels of {batch.y.shape[1]} classes are to be mixed as of {classes}: give their number")
    if batch.y.ndim == 2:
        return batch.y.astype(dtype)
    known = (batch.y >= 0) & (batch.y < classes)
    return jnp.where(known[:, None], jax.nn.one_hot(batch.y, classes, dtype=dtype), jnp.nan)


def _check_images(name: str, x: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} takes images [B, H, W, C], got shape {list(x.shape)}")


def _check_alpha(name: str, alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"{name} draws from Beta(alpha, alpha) with alpha above 0, got {alpha}")
