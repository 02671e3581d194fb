"""Input diversity: a model that sees each image at a random size and place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.attacks.parts.stochastic import Stochastic, redrawn
from jaxnets.types import Array, LogitsFn


def diversified(
    logits_fn: LogitsFn, probability: Any = 0.5, low: Any = 0.9, *, key: Array | None = None, samples: int = 1
) -> Stochastic:
    """``logits_fn`` of images that are, with a probability, shrunk at random and padded with zeros at random.

    The scale ``s`` is uniform in ``[low, 1]``, the place uniform where the shrunk image fits, and the size stays: the
    paper enlarges and pads to a larger size, which fewer networks take. Attacks on it draw anew at every step.

    Args:
      logits_fn: ``x[B, H, W, C] -> logits[B, K]``.
      probability: of a row to be changed, in [0, 1].
      low: the smallest scale, in (0, 1].
      key: what a call outside an attack draws with; ``key(0)`` unless given.
      samples: draws per gradient; static.

    Raises:
      ValueError: when called, for rows that are no images.

    Xie et al. 2019, https://arxiv.org/abs/1803.06978.

    >>> model = diversified(lambda x: x.reshape(len(x), -1), 1.0, 0.5)
    >>> bool(model(jnp.ones((3, 8, 8, 1))).mean() < 1)
    True
    """
    key = jax.random.key(0) if key is None else key
    return Stochastic(Partial(_diverse, as_pytree(logits_fn), probability, low), key, samples)


def _diverse(logits_fn: LogitsFn, probability: Any, low: Any, key: Array, x: Array) -> Array:
    """The logits of one image ``[1, H, W, C]``."""
    if x.ndim != 4:
        raise ValueError(f"diversified takes images [B, H, W, C], got rows of shape {list(x.shape[1:])}")
    change_key, choice_key, model_key = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(choice_key, probability)
    x = jnp.where(chosen, shrunk(change_key, x[0], low)[None], x)
    return redrawn(logits_fn, model_key[None], 0)(x)


def shrunk(key: Array, image: Array, low: Any) -> Array:
    """The image ``[H, W, C]`` at a random scale in ``[low, 1]`` and place, zeros around it."""
    scale_key, place_key = jax.random.split(key)
    scale = jax.random.uniform(scale_key, (), jnp.float32, low, 1.0)
    room = (1 - scale) * jnp.array(image.shape[:2], jnp.float32)
    corner = room * jax.random.uniform(place_key, (2,))
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), jnp.stack([scale, scale]), corner, "linear", antialias=False
    ).astype(image.dtype)
