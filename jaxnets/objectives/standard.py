"""Empirical risk minimisation."""

import jax.numpy as jnp

from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.types import Array, Batch, Loss, Metrics, Objective, Params, Stats


def standard(net: Classifier, *, loss: Loss = cross_entropy) -> Objective:
    """The mean loss on the batch as it is: ``1/B sum_i loss(f(x_i), y_i)``.

    Args:
      net: batch statistics move with the batch, dropout is on.
      loss: for smoothed labels, `cross_entropy` against `optax.smooth_labels` of one-hot classes.

    >>> import jax, jaxnets as jn
    >>> net = jn.from_linen(jn.models.MLP(()))
    >>> x, y = jnp.zeros((2, 3)), jnp.array([1, 2])
    >>> params, stats = net.init(jax.random.key(0), x)
    >>> print(standard(net)(params, stats, Batch(x, y), jax.random.key(1))[0])
    2.3025851
    """

    def objective(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, stats = net.train(params, stats, batch.x, key)
        value = jnp.mean(loss(logits, batch.y))
        return value, (stats, {"loss": value, "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch.y)})

    return objective
