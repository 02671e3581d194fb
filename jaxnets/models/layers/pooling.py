"""Pooling over windows, with gradients that are fast inside compiled loops as well. Images are ``[B, H, W, C]``."""

import math
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.types import Array

Pair = tuple[int, int]
_NONE = ((0, 0), (0, 0))


def max_pool(x: Array, window: Pair = (2, 2), strides: Pair | None = None, padding: tuple[Pair, Pair] = _NONE) -> Array:
    """Maximum over windows.

    As `flax.linen.max_pool`, ties included (the first of the largest takes the gradient), and several times faster to
    differentiate on a CPU.

    Args:
      x: ``[B, H, W, C]``.
      window: height and width.
      strides: from a window to the next, down and right; windows lie side by side unless given.
      padding: rows above and below, and columns left and right, that never are the maximum. What PyTorch calls
        ``ceil_mode`` is a padding below and right of one less than the stride, where no window begins in it.

    Returns:
      ``[B, H', W', C]``; rows and columns that fill no window are dropped.

    Raises:
      ValueError: where the image holds no window, or a window would be of padding alone.

    >>> print(max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1), (3, 3), (2, 2))[0, :, :, 0])
    [[12. 14.]
     [22. 24.]]
    """
    strides = strides or window
    for length, size, stride, edges in zip(x.shape[1:3], window, strides, padding, strict=True):
        _check_filled(length, size, stride, edges)
    if strides == window:
        return _largest_side_by_side(_windows(x, window, padding, -jnp.inf))
    # Of windows that overlap first the rows, then the columns of those: fewer entries, and ties go to the same one.
    x = _largest(_entries(x, (1, window[1]), (1, strides[1]), ((0, 0), padding[1]), -jnp.inf))
    return _largest(_entries(x, (window[0], 1), (strides[0], 1), (padding[0], (0, 0)), -jnp.inf))


def avg_pool(x: Array, window: Pair = (2, 2), strides: Pair | None = None, padding: tuple[Pair, Pair] = _NONE) -> Array:
    """Mean over windows; arguments and shapes as for `max_pool`. Padding counts as zeros."""
    entries = _entries(x, window, strides or window, padding, 0)
    return reduce(jnp.add, entries) / len(entries)


def adaptive_avg_pool(x: Array, size: Pair) -> Array:
    """Means over ``size`` windows that cover the image: window ``i`` of ``n`` has rows ``[i H/n]`` to ``(i+1) H/n``.

    What lets a network that ends in dense layers take images of any size; one of that size stays as it is.

    >>> print(adaptive_avg_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), (2, 2))[0, :, :, 0])
    [[2. 3.]
     [5. 6.]]
    """
    if x.shape[1:3] == tuple(size):
        return x
    down, right = (jnp.asarray(_means(*lengths), x.dtype) for lengths in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("bhwc,ih,jw->bijc", x, down, right)


def flatten(x: Array) -> Array:
    """``[B, ...] -> [B, N]``.

    Raises:
      ValueError: for an array whose rows hold nothing.
    """
    if 0 in x.shape[1:]:
        raise ValueError(f"nothing is left of the images, {list(x.shape)}: they are too small for this network")
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _entries(x: Array, window: Pair, strides: Pair, padding: tuple[Pair, Pair], fill: float) -> list[Array]:
    """For each place in a window, row by row, the entries ``[B, H', W', C]`` that all windows have there."""
    if strides == window:
        return _by_place(_windows(x, window, padding, fill))
    x, places = _filled(x, window, strides, padding, fill)
    last = [strides[n] * (places[n] - 1) + 1 for n in (0, 1)]
    taps = np.ndindex(window)
    return [x[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]] for i, j in taps]


def _windows(x: Array, window: Pair, padding: tuple[Pair, Pair], fill: float) -> Array:
    """``[B, H', h, W', w, C]``: windows side by side."""
    x, places = _filled(x, window, window, padding, fill)
    return x.reshape(len(x), places[0], window[0], places[1], window[1], x.shape[3])


def _by_place(windows: Array) -> list[Array]:
    """``[B, H', W', C]`` for each place in windows side by side, row by row."""
    return [windows[:, :, row, :, column] for row, column in np.ndindex(windows.shape[2], windows.shape[4])]


def _filled(x: Array, window: Pair, strides: Pair, padding: tuple[Pair, Pair], fill: float) -> tuple[Array, list[int]]:
    """Padded, without what fills no window; and how many windows there are down and to the right."""
    room = [x.shape[n + 1] + sum(padding[n]) - window[n] for n in (0, 1)]
    if min(room) < 0:
        raise ValueError(f"an image of {x.shape[1]}x{x.shape[2]} holds no pooling window of {window[0]}x{window[1]}")
    unused = [room[n] % strides[n] for n in (0, 1)]
    edges = [(padding[n][0], padding[n][1] - unused[n], 0) for n in (0, 1)]
    x = lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return x, [room[n] // strides[n] + 1 for n in (0, 1)]


@jax.custom_jvp
def _largest_side_by_side(windows: Array) -> Array:
    """Of ``[B, H', h, W', w, C]`` the largest of each window; the first of them takes the gradient.

    What the gradient needs is a place in the window, of a byte: one pass finds it, and one more writes the gradient.
    """
    return reduce(jnp.maximum, _by_place(windows))


@_largest_side_by_side.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    [windows], [windows_dot] = primals, tangents
    height, width = windows.shape[2], windows.shape[4]
    places = np.arange(height * width, dtype=np.min_scalar_type(height * width))
    largest, *later = _by_place(windows)
    place = jnp.zeros(largest.shape, places.dtype)
    for number, entry in zip(places[1:], later, strict=True):
        larger = _is_larger(entry, largest)
        largest, place = jnp.where(larger, entry, largest), jnp.where(larger, number, place)
    places = places.reshape(height, 1, width, 1)
    chosen = jnp.where(place[:, :, None, :, None] == places, windows_dot, 0)
    return _largest_side_by_side(windows), jnp.sum(chosen, axis=(2, 4))


def _largest(entries: list[Array]) -> Array:
    """The first of the largest, by choices.

    Not by `jnp.max`: its gradient goes to the entries that equal the maximum, and where a compiler computes both anew
    in different fusions they differ by a rounding error, and gradients are lost.
    """
    return reduce(lambda best, entry: jnp.where(_is_larger(entry, best), entry, best), entries)


def _is_larger(entry: Array, best: Array) -> Array:
    return (entry > best) | jnp.isnan(entry)


def _check_filled(length: int, window: int, stride: int, padding: Pair) -> None:
    last = (length + sum(padding) - window) // stride * stride
    if padding[0] >= window or last >= padding[0] + length:
        raise ValueError(
            f"a pooling window of padding alone has no maximum: got a length of {length}, windows of {window} every "
            f"{stride}, padding {padding}"
        )


def _means(length: int, parts: int) -> np.ndarray:
    """``[parts, length]``: a row for each window, of ones over its length."""
    place, number = np.arange(length), np.arange(parts)[:, None]
    inside = (place >= number * length // parts) & (place < -(-(number + 1) * length // parts))
    return inside / inside.sum(axis=1, keepdims=True)
