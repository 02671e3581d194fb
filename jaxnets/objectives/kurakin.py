"""Adversarial training at scale: a part of every batch is attacked in one step, each row with an epsilon of its own."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.attacks.parts.calling import row_keys
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives.minmax import MinMax, under
from jaxnets.objectives.standard import accuracy, metrics_of, passed
from jaxnets.threats import Threat
from jaxnets.types import Array, Batch, LogitsFn, Loss, Metrics, Params, Stats


def kurakin(
    net: Classifier,
    attack: Callable[..., Array],
    *,
    threat: Threat,
    share: float = 0.5,
    weight: Any = 0.3,
    spread: float = 0.5,
    loss: Loss = cross_entropy,
) -> MinMax:
    """``(sum_clean loss + weight sum_attacked loss) / (m - k + weight k)`` over the ``m`` rows of a batch.

    ``k = share m`` rows, evenly spaced, are attacked, each with an epsilon drawn from ``|N(0, spread epsilon)|``, drawn
    again above the threat's epsilon. All rows pass together, and move the batch statistics together. The metric
    ``accuracy`` is that of the whole batch, ``clean_accuracy`` that of its clean rows where there are both kinds.

    Args:
      net: as for `standard`.
      attack: ``(key, logits_fn, x, target, *, threat) -> x_adv``, without its threat. Against label leaking, one that
        does not look at the label: `attacks.least_likely_class`, or ``attacks.on_prediction(attacks.fgsm)``.
      threat: norm, box, and the largest epsilon; 16/255 in the paper.
      share: of the batch that is attacked; 1/2 in the paper.
      weight: lambda, of an attacked row.
      spread: standard deviation before it is cut off, in units of the largest epsilon; 8/16 in the paper.
      loss: of each row.

    Raises:
      ValueError: for a share outside 0 to 1.

    Kurakin et al. 2017, https://arxiv.org/abs/1611.01236.

    >>> import jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = kurakin(net, jn.attacks.least_likely_class, threat=jn.Linf(16 / 255))
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'clean_accuracy', 'loss']
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of a batch that is attacked, from 0 to 1, got {share}")

    def some(key: Array, model: LogitsFn, x: Array, y: Array) -> Array:
        count, groups = _counts(len(x), share)
        if not count:
            return x
        epsilon_key, attack_key = jax.random.split(key)
        chosen = _grouped(x, groups)[:, : count // groups].reshape(count, *x.shape[1:])
        classes = _grouped(y, groups)[:, : count // groups].reshape(count, *y.shape[1:])
        drawn = jax.vmap(lambda key: jax.random.truncated_normal(key, 0, 1 / spread))(row_keys(epsilon_key, count))
        each = replace(threat, epsilon=spread * threat.epsilon * drawn)  # pyright: ignore
        x_adv = _grouped(attack(attack_key, model, chosen, classes, threat=each), groups)
        return jnp.concatenate([x_adv, _grouped(x, groups)[:, count // groups :]], axis=1).reshape(x.shape)

    def outer(
        params: Params, stats: Stats, batch: Batch, mixed: Array, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, stats = passed(net, params, stats, mixed, key)
        is_attacked = _is_attacked(len(mixed), share)
        each = loss(logits, batch.y)
        weights = jnp.where(is_attacked, weight, 1.0).astype(each.dtype)
        value = jnp.sum(weights * each) / jnp.sum(weights)
        metrics = metrics_of(value, logits, batch.y)
        if 0 < is_attacked.sum() < len(mixed):
            metrics["clean_accuracy"] = accuracy(logits[~is_attacked], batch.y[~is_attacked])
        return value, (stats, metrics)

    return MinMax(under(net, some), outer)


def _counts(rows: int, share: float) -> tuple[int, int]:
    """How many rows are attacked, and in how many groups of neighbours: as many as make all groups alike.

    Neighbours, so that every device attacks rows of its own.
    """
    count = round(share * rows)
    return count, math.gcd(rows, count)


def _is_attacked(rows: int, share: float) -> np.ndarray:
    """The first rows of every group: bool ``[rows]``."""
    count, groups = _counts(rows, share)
    return np.arange(rows) % (rows // groups) < count // groups


def _grouped(rows: Any, groups: int) -> Any:
    return rows.reshape(groups, -1, *rows.shape[1:])
