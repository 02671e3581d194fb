"""Ensemble adversarial training: examples made on other models too, which this one cannot learn to blind."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives import statistics
from jaxnets.objectives.minmax import MinMax, under
from jaxnets.objectives.standard import accuracy, metrics_of
from jaxnets.objectives.statistics import MovedBy
from jaxnets.types import Array, Attack, Batch, LogitsFn, Loss, Metrics, Params, Stats


def ensemble_adversarial(
    net: Classifier,
    attack: Attack,
    models: Sequence[LogitsFn],
    *,
    weight: Any = 0.5,
    loss: Loss = cross_entropy,
    moved_by: MovedBy = statistics.both,
) -> MinMax:
    """``(1 - weight) mean loss(f(x), y) + weight mean loss(f(x'), y)``, with ``x'`` an attack on one of several models.

    For every batch the model is drawn among the given ones and the network itself. The metric ``accuracy`` is that on
    the attacked rows, ``clean_accuracy`` on the clean ones.

    Args:
      net: as for `standard`.
      attack: of one step in the paper: `attacks.fgsm`, for RAND+FGSM with ``start=attacks.random_signs(epsilon / 2)``
        and ``step_size=epsilon / 2``. Against label leaking, `attacks.on_prediction` of it.
      models: trained before, and not trained here.
      weight: of the attacked rows; 1/2 in the paper.
      loss: of each row.
      moved_by: which batch moves the batch statistics: the clean one, then the attacked one unless given.

    Raises:
      ValueError: without models.

    Tramer et al. 2018, https://arxiv.org/abs/1705.07204.

    >>> import jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP((), classes=3)), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = ensemble_adversarial(net, partial(jn.attacks.fgsm, threat=jn.Linf(0.1)), [lambda x: 9 * x])
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'clean_accuracy', 'loss']
    """
    if not models:
        raise ValueError("ensemble_adversarial takes at least one other model, got none: see adversarial")

    def on_one(key: Array, model: LogitsFn, x: Array, y: Array) -> Array:
        model_key, attack_key = jax.random.split(key)
        attacks = [partial(attack, attack_key, source, x, y) for source in (*models, model)]
        return jax.lax.switch(jax.random.randint(model_key, (), 0, len(attacks)), attacks)

    def outer(
        params: Params, stats: Stats, batch: Batch, x_adv: Array, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, attacked, stats = statistics.passes(net, params, stats, batch.x, x_adv, key, moved_by=moved_by)
        of_clean, of_attacked = (jnp.mean(loss(one, batch.y)) for one in (logits, attacked))
        value = (1 - weight) * of_clean + weight * of_attacked
        metrics = metrics_of(value, attacked, batch.y) | {"clean_accuracy": accuracy(logits, batch.y)}
        return value, (stats, metrics)

    return MinMax(under(net, on_one), outer)
