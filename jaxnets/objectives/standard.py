"""Empirical risk minimisation."""

import jax.numpy as jnp

from jaxnets.attacks.parts.calling import checked_logits
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy, is_right
from jaxnets.types import Array, Batch, Loss, Metrics, Objective, Params, Stats


def standard(net: Classifier, *, loss: Loss = cross_entropy) -> Objective:
    """The mean loss on the batch as it is: ``1/B sum_i loss(f(x_i), y_i)``.

    Args:
      net: batch statistics move with the batch, dropout is on.
      loss: for smoothed labels `losses.smoothed`.

    >>> import jax, jaxnets as jn
    >>> net = jn.from_linen(jn.models.MLP(()))
    >>> x, y = jnp.zeros((2, 3)), jnp.array([1, 2])
    >>> params, stats = net.init(jax.random.key(0), x)
    >>> print(standard(net)(params, stats, Batch(x, y), jax.random.key(1))[0])
    2.3025851
    """

    def objective(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, stats = passed(net, params, stats, batch.x, key)
        value = jnp.mean(loss(logits, batch.y))
        return value, (stats, metrics_of(value, logits, batch.y))

    return objective


def passed(net: Classifier, params: Params, stats: Stats, x: Array, key: Array) -> tuple[Array, Stats]:
    """A batch through the network in training: its logits ``[B, K]``, in at least single precision as in attacks."""
    logits, stats = net.train(params, stats, x, key)
    return checked_logits(logits, x), stats


def metrics_of(value: Array, logits: Array, y: Array) -> Metrics:
    """What every objective reports: its value, and the share of right predictions among ``logits[B, K]``."""
    return {"loss": value, "accuracy": accuracy(logits, y)}


def accuracy(logits: Array, y: Array) -> Array:
    """The share of rows whose largest logit is that of their class ``y[B]``, or of the likeliest of ``y[B, K]``."""
    return jnp.mean(is_right(logits, y))
