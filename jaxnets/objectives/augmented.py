"""Objectives on augmented batches."""

import jax

from jaxnets.data.augmentation import Augmentation, in_turn
from jaxnets.types import Array, Batch, Metrics, Objective, Params, Stats


def augmented(objective: Objective, *augmentations: Augmentation) -> Objective:
    """The objective of the batch as the augmentations, one after the other, leave it.

    It stands outside of other wrappers: ``augmented(awp(trades(...), ...), random_crop, random_flip)``. `data.mixup`
    and `data.cutmix` make labels probabilities ``[B, K]``, of which the ``accuracy`` takes the largest. Free replays
    would draw anew each: `training.make_free_step` takes augmentations itself.

    Args:
      objective: any whose loss takes such labels.
      augmentations: ``(key, batch) -> batch``, those of `data` for example.

    >>> import jax.numpy as jnp, jaxnets as jn
    >>> mean = lambda params, stats, batch, key: (jnp.mean(batch.x), (stats, {}))
    >>> doubled = augmented(mean, lambda key, batch: batch._replace(x=2 * batch.x))
    >>> print(doubled({}, {}, Batch(jnp.ones((2, 3)), jnp.zeros(2, int)), jax.random.key(0))[0])
    2.0
    """

    def on_augmented(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        augment_key, key = jax.random.split(key)
        return objective(params, stats, in_turn(augmentations, augment_key, batch), key)

    return on_augmented
