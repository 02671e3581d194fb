"""Convolution whose gradients are fast inside compiled loops as well."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets import cpu
from jaxnets.models.layers.bilinear import bilinear
from jaxnets.types import Array

_NHWC = lax.conv_dimension_numbers((0, 0, 0, 0), (0, 0, 0, 0), ("NHWC", "HWIO", "NHWC"))

_NO_PADDING = ((0, 0), (0, 0))

_FEW_CHANNELS = 4
"""Up to how many a CPU multiplies matrices faster than it convolves."""

_FEW_OUTPUTS = 8
"""For up to how many it is better to compute four pixels at once, and for twice as many two."""

_FEW_GROUPS = 8
"""Up to how many are faster as convolutions of their own on a CPU, which has no fast kernel for groups."""


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = _NHWC,
    feature_group_count: int = 1,
    precision: Any = None,
) -> Array:
    """`lax.conv_general_dilated`, with transposes that XLA's CPU backend recognises inside loops.

    That backend has a fast kernel for convolutions in canonical form (NHWC, HWIO) alone, and rewrites others into it
    only outside loops: the gradients of a convolution in a ``fori_loop`` or ``scan`` are else 5 to 9 times slower. Here
    the tangents are written so that their transposes are canonical; values and all derivatives are those of
    `lax.conv_general_dilated`, which serves everything but two-dimensional convolutions in at most 8 groups on a CPU.
    Where `cpu.tune` has oneDNN convolve, the forms are those that it is fast in.

    Args:
      lhs: ``[B, H, W, C]``.
      rhs: kernel ``[h, w, C, D]``.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, precision:
        as for `lax.conv_general_dilated`.

    Returns:
      ``[B, H', W', D]``.
    """
    by_lax = partial(
        lax.conv_general_dilated, lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
        feature_group_count, precision=precision,
    )  # fmt: skip
    if feature_group_count > _FEW_GROUPS or not is_plain(dimension_numbers, *(lhs_dilation or ())):
        return by_lax()
    strides, dilation = tuple(window_strides), tuple(rhs_dilation or (1, 1))
    window = [(size - 1) * step + 1 for size, step in zip(rhs.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], window, strides, padding)
    room = [size + sum(pads) for size, pads in zip(lhs.shape[1:3], padding, strict=True)]
    if lhs.size == 0 or any(have < taken for have, taken in zip(room, window, strict=True)):
        return by_lax()  # of nothing
    convolve = _canonical(strides, tuple(map(tuple, padding)), dilation, precision)
    if feature_group_count == 1:
        return convolve(lhs, rhs)
    inputs, kernels = (jnp.split(operand, feature_group_count, axis=3) for operand in (lhs, rhs))
    return jnp.concatenate([convolve(*group) for group in zip(inputs, kernels, strict=True)], axis=3)


def is_plain(dimension_numbers: Any, *ones: int) -> bool:
    """Whether a convolution is ``NHWC, HWIO -> NHWC`` on a CPU, and all others are 1."""
    return jax.default_backend() == "cpu" and dimension_numbers == _NHWC and all(one == 1 for one in ones)


@cache
def _canonical(strides, padding, rhs_dilation, precision) -> Callable[[Array, Array], Array]:
    settings: dict[str, Any] = {"rhs_dilation": rhs_dilation, "precision": precision}
    convolved = partial(_convolved, **settings)
    by_columns = partial(_by_columns, strides=strides, padding=padding, precision=precision)
    dense = rhs_dilation == (1, 1)

    def few(lhs, pixels=1):
        return dense and pixels * lhs.shape[3] <= _FEW_CHANNELS

    def of_input(lhs_dot, rhs):
        if few(lhs_dot):
            return by_columns(lhs_dot, rhs)
        moved, edges = strides, padding
        if dense and strides != (1, 1):
            # The transpose of a stride is a convolution of an array that is mostly zeros. Blocks of pixels have none,
            # nor have the pixels that a 1x1 kernel is at.
            if rhs.shape[:2] == (1, 1) and padding == _NO_PADDING:
                lhs_dot = lhs_dot[:, :: strides[0], :: strides[1]]
            else:
                lhs_dot, rhs, edges = _blocks_as_channels(lhs_dot, rhs, strides, padding)
            moved = 1, 1
        # The transpose swaps the kernel's I and O, from HWOI to HWIO, and reverses it: here already, for a loop's
        # convolution would do so in every round.
        kernel = lax.rev(rhs.transpose(0, 1, 3, 2), (0, 1))
        pixels = _pixels(lhs_dot.shape[2], kernel) if dense and not cpu.by_onednn(lhs_dot.dtype) else 1
        kernel = lax.rev(lax.optimization_barrier(_beside(kernel, pixels)), (0, 1))
        lhs_dot = lhs_dot.reshape(*lhs_dot.shape[:2], -1, pixels * lhs_dot.shape[3])
        above_below, (left, right) = edges
        edges = above_below, (left + pixels - 1, right + pixels - 1)
        return lax.conv_general_dilated(
            lhs_dot, kernel, moved, edges, (1, pixels), **settings, dimension_numbers=("NHWC", "HWOI", "NHWC")
        )

    def of_kernel(lhs, rhs_dot):
        # Its transpose convolves the input with the output's cotangent, batch and features swapped: from here to
        # NHWC, HWIO -> NHWC.
        if few(lhs) and strides != (1, 1):
            lhs, rhs_dot, edges = _blocks_as_channels(lhs, rhs_dot, strides, padding)
            return convolved(lhs, rhs_dot, (1, 1), edges, swap=True)
        if dense and cpu.by_onednn(lhs.dtype) and not few(lhs) and rhs_dot.shape[:2] != (1, 1):
            return _channels_as_pixels(lhs, rhs_dot, strides, padding, precision=precision)
        return convolved(lhs, rhs_dot, strides, padding, swap=True)

    def convolve(lhs, rhs):
        if strides != (1, 1) and few(lhs, strides[0] * strides[1]):
            return by_columns(lhs, rhs)
        return convolved(lhs, rhs, strides, padding)

    return bilinear(convolve, of_input, of_kernel)


def _convolved(
    lhs: Array, rhs: Array, strides: Any, padding: Any, *, rhs_dilation: Any, precision: Any, swap: bool = False
) -> Array:
    """The convolution; ``swap`` has batch and features change places in what is computed, not in the result."""
    width = lhs.shape[2] + sum(padding[1]) - rhs.shape[1] + 1
    by_xla = swap or not cpu.by_onednn(lhs.dtype)
    pixels = _pixels(width, rhs) if by_xla and strides == rhs_dilation == (1, 1) else 1
    rhs, numbers = _beside(rhs, pixels), _NHWC
    if swap:
        lhs, rhs, numbers = lhs.transpose(3, 1, 2, 0), rhs.transpose(2, 0, 1, 3), ("CHWN", "IHWO", "HWNC")
    strides = strides[0], strides[1] * pixels
    out = lax.conv_general_dilated(
        lhs, rhs, strides, padding, rhs_dilation=rhs_dilation, dimension_numbers=numbers, precision=precision
    )
    out = out.transpose(2, 0, 1, 3) if swap else out
    return out.reshape(*out.shape[:2], pixels * out.shape[2], -1)


def _channels_as_pixels(lhs: Array, rhs: Array, strides: tuple[int, int], padding: Any, *, precision: Any) -> Array:
    """The convolution of one image, whose channels are the rows: its pixels are those of a row, channel by channel.

    For the kernel's gradient, which is long products for each pair of channels: those of the input become the pixels,
    which the multiplication of matrices in oneDNN needs many of, where the kernel alone has nine.
    """
    rows, height, _, channels = lhs.shape
    above_below, (left, right) = padding
    return lax.conv_general_dilated(
        lhs.transpose(1, 2, 3, 0).reshape(1, height, -1, rows), rhs.reshape(1, len(rhs), -1, rhs.shape[3]),
        (strides[0], strides[1] * channels), (above_below, (left * channels, right * channels)),
        dimension_numbers=("CHWN", "IHWO", "NHWC"), precision=precision,
    )  # fmt: skip


def _pixels(width: int, rhs: Array) -> int:
    """How many pixels side by side a CPU best computes at once, as channels of an image so many times narrower.

    It copies the window of each pixel before it multiplies: for few outputs that takes longer than to multiply.
    """
    _, across, inputs, outputs = rhs.shape
    few = 4 * _FEW_OUTPUTS if inputs <= _FEW_CHANNELS else _FEW_OUTPUTS
    return math.gcd(width, 1 if across == 1 or outputs > 2 * few else 2 if outputs > few else 4)


def _beside(rhs: Array, pixels: int) -> Array:
    """The kernel ``[h, w, C, D]`` for so many pixels side by side: ``[h, w + pixels - 1, C, pixels D]``."""
    shifted = [jnp.pad(rhs, ((0, 0), (n, pixels - 1 - n), (0, 0), (0, 0))) for n in range(pixels)]
    return jnp.concatenate(shifted, axis=3)


def _by_columns(lhs: Array, rhs: Array, *, strides: tuple[int, int], padding: Any, precision: Any) -> Array:
    """The convolution as a product of matrices, with a row for each window: for few channels, the fastest on a CPU."""
    blocks, kernel, edges = _blocks_as_channels(lhs, rhs, strides, padding)
    blocks = jnp.pad(blocks, [(0, 0), *edges, (0, 0)])
    down, right, _, features = kernel.shape
    height, width = blocks.shape[1] - down + 1, blocks.shape[2] - right + 1
    taps = [blocks[:, i : i + height, j : j + width] for i in range(down) for j in range(right)]
    return jnp.dot(jnp.concatenate(taps, axis=3), kernel.reshape(-1, features), precision=precision)


def pulled_back(
    cotangent: Array, image: tuple[int, int, int], rhs: Array, window_strides: Any, padding: Any, precision: Any = None
) -> Array:
    """What `conv_general_dilated` in one group pulls back to its input: a convolution again, whose gradients are fast.

    Args:
      cotangent: ``[B, H', W', D]``.
      image: ``(H, W, C)`` of the input.
      rhs: kernel ``[h, w, C, D]``.
      window_strides, padding, precision: of the convolution, padding as pairs.

    Returns:
      ``[B, H, W, C]``.
    """
    rows = jax.ShapeDtypeStruct((len(cotangent), *image), cotangent.dtype)
    axes = _axes_in_blocks(image, rhs.shape, window_strides, padding)
    kernel = _blocks_of_kernel(rhs, axes)
    # By itself: where a convolution pads, XLA may swap its operands for the gradient, and falls to a naive loop.
    edges = [(axis.taps - 1 - axis.edges[0], axis.taps - 1 - axis.edges[1], 0) for axis in axes]
    cotangent = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    blocks = conv_general_dilated(cotangent, kernel, (1, 1), "VALID", precision=precision)
    [lhs] = jax.linear_transpose(partial(_blocks_of_input, axes=axes), rows)(blocks)
    return lhs


class _Axis(NamedTuple):
    """How one axis of a strided convolution is cut into blocks, as many pixels as a stride.

    Attributes:
      stride: pixels a block.
      before: zeros before the first pixel, within its block.
      blocks: of the image.
      lead: zeros before the kernel's first tap, within its block.
      taps: blocks of the kernel.
      edges: blocks of nothing but padding, before and after.
    """

    stride: int
    before: int
    blocks: int
    lead: int
    taps: int
    edges: tuple[int, int]


def _in_blocks(image: int, window: int, stride: int, padding: tuple[int, int]) -> _Axis:
    taps = -(-window // stride)
    # The kernel may begin within a block, so that the image does not; not if that takes another block.
    lead = -padding[0] % stride
    lead = lead if window + lead <= taps * stride else 0
    needed = (image + sum(padding) - window) // stride + taps
    first = min((padding[0] + lead) // stride, needed - 1)
    before = padding[0] + lead - first * stride
    blocks = min(needed - first, -(-(before + image) // stride))
    return _Axis(stride, before, blocks, lead, taps, (first, needed - first - blocks))


def _axes_in_blocks(image: Any, window: Any, strides: Any, padding: Any) -> tuple[_Axis, _Axis]:
    down, right = zip(image[:2], window[:2], strides, padding, strict=True)
    return _in_blocks(*down), _in_blocks(*right)


def _blocks_as_channels(lhs: Array, rhs: Array, strides: tuple[int, int], padding: Any) -> tuple[Array, Array, Any]:
    """Input, kernel and padding of the same convolution with stride 1, on blocks of pixels as channels."""
    axes = _axes_in_blocks(lhs.shape[1:], rhs.shape, strides, padding)
    return _blocks_of_input(lhs, axes), _blocks_of_kernel(rhs, axes), tuple(axis.edges for axis in axes)


def _blocks_of_input(lhs: Array, axes: tuple[_Axis, _Axis]) -> Array:
    after = [axis.stride * axis.blocks - axis.before - lhs.shape[n] for n, axis in enumerate(axes, start=1)]
    edges = [(0, 0, 0), *((axis.before, rest, 0) for axis, rest in zip(axes, after, strict=True)), (0, 0, 0)]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)
    down, right = axes
    lhs = lhs.reshape(-1, down.blocks, down.stride, right.blocks, right.stride * lhs.shape[3]).swapaxes(2, 3)
    return lhs.reshape(*lhs.shape[:3], -1)


def _blocks_of_kernel(rhs: Array, axes: tuple[_Axis, _Axis]) -> Array:
    after = [axis.stride * axis.taps - axis.lead - rhs.shape[n] for n, axis in enumerate(axes)]
    edges = [(axis.lead, rest) for axis, rest in zip(axes, after, strict=True)]
    rhs = jnp.pad(rhs, [*edges, (0, 0), (0, 0)])
    down, right = axes
    rhs = rhs.reshape(down.taps, down.stride, right.taps, right.stride * rhs.shape[2], -1).swapaxes(1, 2)
    return rhs.reshape(down.taps, right.taps, -1, rhs.shape[4])


Conv = partial(nn.Conv, conv_general_dilated=conv_general_dilated)
"""`flax.linen.Conv` by `conv_general_dilated`."""
