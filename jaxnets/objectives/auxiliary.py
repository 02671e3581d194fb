"""Heads in the middle of a network that are trained with it."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxnets.attacks.parts.calling import checked_logits
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives.standard import metrics_of
from jaxnets.types import Array, Batch, Loss, Metrics, Objective, Params, Stats


def auxiliary(
    net: Classifier, *, heads: Sequence[str] = ("aux1", "aux2"), weight: float = 0.3, loss: Loss = cross_entropy
) -> Objective:
    """`standard` with a share of the losses of other heads: ``mean loss(f(x), y) + weight sum_h mean loss(h(x), y)``.

    They give the first layers of a deep network a gradient of their own. The accuracy is that of the network's logits.

    Args:
      net: as for `standard`; its activations of the names ``heads`` are logits ``[B, K]``.
      heads: those of `GoogLeNet` unless given.
      weight: of each head.
      loss: of each.

    Raises:
      ValueError: for a name that no activation has.

    Szegedy et al. 2015, https://arxiv.org/abs/1409.4842.

    >>> import jax, jaxnets as jn
    >>> net = jn.from_linen(jn.models.MLP((4,), classes=2))
    >>> key, x, y = jax.random.key(0), jnp.ones((3, 5)), jnp.array([0, 1, 1])
    >>> params, stats = net.init(key, x)
    >>> with_head = auxiliary(net, heads=["Dense_1"], weight=1.0)  # the logits as a head: its loss counts twice
    >>> once, twice = (f(params, stats, Batch(x, y), key)[0] for f in (jn.objectives.standard(net), with_head))
    >>> bool(jnp.allclose(twice, 2 * once))
    True
    """

    def objective(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, stats, activations = net.activations(params, stats, batch.x, key)
        absent = [head for head in heads if head not in activations]
        if absent:
            raise ValueError(f"the network has no activations {absent}; it has {', '.join(activations)}")
        logits, *of_heads = (checked_logits(one, batch.x) for one in (logits, *(activations[head] for head in heads)))
        value = jnp.mean(loss(logits, batch.y)) + weight * sum(jnp.mean(loss(one, batch.y)) for one in of_heads)
        return value, (stats, metrics_of(value, logits, batch.y))

    return objective
