"""Adversarial patches: a picture that decides the prediction wherever it lies in the image, however large and turned.

For a sticker in a fixed place see `threats.Masked`, a threat for `pgd` (one image) and `universal` (many).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.ndimage import map_coordinates

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.rules import Rule, by_optax, normalized
from jaxnets.attacks.universal import Data, ascend, check_passes
from jaxnets.losses import cross_entropy, targeted
from jaxnets.threats import Linf
from jaxnets.types import Array, LogitsFn, Loss

_ADAM = normalized(by_optax(optax.adam(1.0)))


def disk(u: Array, v: Array) -> Array:
    """A round patch, where ``u`` and ``v`` run from -1 to 1 across it."""
    return u**2 + v**2 <= 1


def square(u: Array, v: Array) -> Array:
    """A square patch."""
    return jnp.maximum(jnp.abs(u), jnp.abs(v)) <= 1


@dataclass(frozen=True)
class Placement:
    """Lays a patch on an image at a random place, scale and angle: ``place(key, patch[s, s, C], image[H, W, C])``.

    Each is uniform; what of a turned square sticks out of the image is cut off. A pytree: ranges are leaves.

    Attributes:
      scale: least and largest side, as a share of the image's shorter side.
      angle: least and largest turn, in radians.
      shape: ``(u, v) -> bool``, which part of the patch's square ``[-1, 1]^2`` is patch; static.
    """

    scale: tuple[Any, Any] = (0.3, 0.5)
    angle: tuple[Any, Any] = (-0.4, 0.4)
    shape: Callable[[Array, Array], Array] = disk

    def __call__(self, key: Array, patch: Array, image: Array) -> Array:
        scale_key, angle_key, place_key = jax.random.split(key, 3)
        height, width = image.shape[:2]
        low, high = (jnp.asarray(one, jnp.float32) for one in self.scale)
        half = min(height, width) / 2 * jax.random.uniform(scale_key, (), minval=low, maxval=high)
        low, high = (jnp.asarray(one, jnp.float32) for one in self.angle)
        angle = jax.random.uniform(angle_key, (), minval=low, maxval=high)
        room = jnp.array([height, width]) - 2 * half
        middle = half + room * jax.random.uniform(place_key, (2,))
        return _laid(patch, image, middle, half, angle, self.shape)


jax.tree_util.register_pytree_node(
    Placement,
    lambda one: ((one.scale, one.angle), one.shape),
    lambda shape, leaves: Placement(*leaves, shape),
)


def train_patch(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    size: int = 16,
    place: Callable[[Array, Array, Array], Array] = Placement(),
    loss: Loss = targeted(cross_entropy),  # noqa: B008
    epochs: int = 10,
    batch_size: int = 100,
    step_size: Any = 0.05,
    rule: Rule = _ADAM,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Array:
    """A patch that raises the mean loss over rows and places: ``max_p mean_i E_t loss(place(t, p, x_i), target_i)``.

    A step a batch, each row with a place drawn anew.

    Args:
      key: one key.
      logits_fn: ``x[B, H, W, C] -> logits[B, K]``.
      x: images ``[N, H, W, C]`` in ``[lower, upper]``.
      target: what ``loss`` takes, with ``N`` rows: the wanted class for each, or with an untargeted loss its own.
      size: the patch's side in pixels; static.
      place: ``(key, patch, image) -> image``, a pytree or a plain function.
      loss: raised.
      epochs: passes through the data, at least 1; static.
      batch_size: rows a step, at least 1; static.
      step_size: the rule's; for the default, Adam, its learning rate in units of the data.
      rule: what is done with a gradient, of size ``upper - lower`` in `Linf`.
      lower, upper: the range of the patch's pixels.

    Returns:
      ``patch[size, size, C]``, from the middle of the range.

    Raises:
      ValueError: for rows that are no images, shapes that do not fit, no epochs, or an empty patch or batch.

    Brown et al. 2017, https://arxiv.org/abs/1712.09665.

    >>> x, wanted = jnp.full((4, 8, 8, 2), 0.5), jnp.ones(4, int)
    >>> patch = train_patch(jax.random.key(0), lambda x: x.mean(axis=(1, 2)), x, wanted, size=3, epochs=20)
    >>> print(patch[1, 1])
    [0. 1.]
    """
    check_rows(x, target)
    check_passes(epochs, batch_size)
    if x.ndim != 4 or size < 1:
        raise ValueError(f"a patch of size >= 1 is laid on images [N, H, W, C]: got size={size}, x {list(x.shape)}")
    data = Data(as_pytree(logits_fn), as_pytree(loss), x, target)
    start = jnp.full((size, size, x.shape[-1]), (lower + upper) / 2, x.dtype)
    anything = Linf(upper - lower, lower, upper)
    batch_size = min(batch_size, len(x))
    return ascend(key, data, start, as_pytree(place), anything, rule, step_size, epochs=epochs, batch_size=batch_size)


def apply_patch(
    key: Array,
    patch: Array,
    x: Array,
    *,
    place: Callable[[Array, Array, Array], Array] = Placement(),
) -> Array:
    """Lays ``patch[s, s, C]`` on every image of ``x[B, H, W, C]``, each at a place of its own.

    Args:
      key: one key, or one a row ``[B]``.
      patch: pixels.
      x: images.
      place: ``(key, patch, image) -> image``.

    Raises:
      ValueError: where the channels differ.

    >>> print(apply_patch(jax.random.key(0), jnp.ones((2, 2, 1)), jnp.zeros((1, 4, 4, 1)))[0, :, :, 0].max())
    1.0
    """
    if x.ndim != 4 or patch.ndim != 3 or patch.shape[-1] != x.shape[-1]:
        raise ValueError(f"patch[s, s, C] is laid on x[B, H, W, C]: got {list(patch.shape)} and {list(x.shape)}")
    return _applied(row_keys(key, len(x)), patch, x, as_pytree(place))


@jax.jit
def _applied(keys: Array, patch: Array, x: Array, place: Any) -> Array:
    return jax.vmap(place, (0, None, 0))(keys, patch, x)


def _laid(patch: Array, image: Array, middle: Array, half: Array, angle: Array, shape: Callable) -> Array:
    """The image with the patch on it: every pixel looks up where in the patch it lies."""
    rows, columns = jnp.meshgrid(*(jnp.arange(side) + 0.5 for side in image.shape[:2]), indexing="ij")
    down, right = rows - middle[0], columns - middle[1]
    v = (jnp.cos(angle) * down - jnp.sin(angle) * right) / half
    u = (jnp.sin(angle) * down + jnp.cos(angle) * right) / half
    at = [_on_grid((one + 1) / 2 * side - 0.5) for one, side in zip((v, u), patch.shape[:2], strict=True)]
    seen = jax.vmap(lambda channel: map_coordinates(channel, at, 1, "nearest"), in_axes=-1, out_axes=-1)(patch)
    return jnp.where(shape(u, v)[..., None], seen, image).astype(image.dtype)


def _on_grid(coordinate: Array) -> Array:
    """To multiples of 1/4096: computed twice, for pixels and for weights, it may lie on two sides of a whole number."""
    return jnp.round(coordinate * 4096) / 4096
