"""The classes that an attack goes towards."""

import jax.numpy as jnp

from jaxnets.types import Array


def check_classes(target: Array, name: str) -> None:
    """Raises ValueError unless ``target`` holds one class a row."""
    if target.ndim != 1 or not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(f"{name} needs integer classes [B] as target, got {target.dtype}{list(target.shape)}")


def likeliest_others(logits: Array, target: Array, classes: int | None = None) -> Array:
    """The ``classes`` classes other than ``target[B]`` with the highest logits, unless given all: ``[B, C]``.

    Raises:
      ValueError: for fewer than 2 classes in all, or less than one wanted.
    """
    available = logits.shape[1] - 1
    wanted = available if classes is None else min(classes, available)
    if wanted < 1:
        raise ValueError(f"an attack needs another class: got classes={classes} and logits {list(logits.shape)}")
    own = jnp.arange(logits.shape[1]) == target[:, None]
    others = jnp.where(own, -jnp.inf, jnp.nan_to_num(logits))
    # Not by `jax.lax.top_k`, for which every device would gather the rows of all.
    return jnp.argsort(others, axis=1, descending=True)[:, :wanted]
