"""Gradient alignment, around any objective: against catastrophic overfitting."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.start import uniform_unclipped
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives.directions import unit
from jaxnets.objectives.minmax import MinMax, halves
from jaxnets.objectives.standard import passed
from jaxnets.threats import Threat
from jaxnets.types import Array, Batch, Loss, Metrics, Objective, Params, Stats


def grad_align(
    objective: Objective, net: Classifier, threat: Threat, *, weight: Any = 0.2, loss: Loss = cross_entropy
) -> MinMax:
    """An objective plus ``weight * mean(1 - cos(grad_x loss(x), grad_x loss(x + noise)))``, noise uniform in the ball.

    It keeps the loss near to linear inside the ball, where one step then does what many do. Gradients are those of the
    network in training, of the statistics of their batch; no averages move with them. Rows with a zero gradient are
    left out of the mean. The gradient of the gradients costs about as much as two parameter gradients.

    Args:
      objective: `fast` in the paper.
      net: the objective's.
      threat: where the noise is drawn from; it may leave the box.
      weight: lambda; 0.2 in the paper for CIFAR-10 and an epsilon of 8/255, more for larger ones.
      loss: whose gradients are aligned.

    Andriushchenko and Flammarion 2020, https://arxiv.org/abs/2007.02617.

    >>> import jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> threat = jn.Linf(8 / 255)
    >>> objective = grad_align(jn.objectives.fast(net, threat, start=jn.attacks.uniform), net, threat)
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'loss', 'misalignment']
    """
    game = halves(objective)

    def inner(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Any, Array]:
        own_key, noise_key = jax.random.split(key)
        noisy = uniform_unclipped(row_keys(noise_key, len(batch.x)), threat, batch.x)
        return game.inner(params, stats, batch, own_key), noisy

    def outer(
        params: Params, stats: Stats, batch: Batch, examples: tuple[Any, Array], key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        own, noisy = examples
        value, (moved, metrics) = game.outer(params, stats, batch, own, key)

        def total(x: Array) -> Array:
            return jnp.sum(loss(passed(net, params, stats, x, key)[0], batch.y))

        apart = _misalignment(jax.grad(total)(batch.x), jax.grad(total)(noisy))
        value += weight * apart
        return value, (moved, metrics | {"loss": value, "misalignment": apart})

    return MinMax(inner, outer)


def _misalignment(first: Array, second: Array) -> Array:
    """The mean of one minus the cosine over the rows of both ``[B, ...]``, of those where neither is zero."""
    places = range(1, first.ndim)
    cosines = jnp.sum(jax.vmap(unit)(first) * jax.vmap(unit)(second), axis=places)
    counted = jnp.any(first != 0, axis=places) & jnp.any(second != 0, axis=places)
    return jnp.sum(jnp.where(counted, 1 - cosines, 0)) / jnp.maximum(jnp.sum(counted), 1)
