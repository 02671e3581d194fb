"""MART: rows that are misclassified already weigh more."""

import jax
import jax.numpy as jnp

from jaxnets.classifier import Classifier
from jaxnets.losses import boosted_cross_entropy
from jaxnets.objectives import statistics
from jaxnets.objectives.minmax import MinMax, under
from jaxnets.objectives.standard import accuracy, metrics_of
from jaxnets.objectives.statistics import MovedBy
from jaxnets.types import Array, Attack, Batch, Metrics, Params, Stats


def mart(net: Classifier, attack: Attack, *, beta: float = 6.0, moved_by: MovedBy = statistics.both) -> MinMax:
    """``1/B sum_i BCE(f(x_i'), y_i) + beta/B sum_i KL(p(x_i) || p(x_i')) (1 - p_{y_i}(x_i))``.

    BCE is `losses.boosted_cross_entropy`. The gradient flows through all of it, the weight ``1 - p_y`` too. The metric
    ``accuracy`` is that on the attacked rows, ``clean_accuracy`` on the clean ones.

    Args:
      net: as for `standard`.
      attack: on the labels, as for `adversarial`; the authors' raises the cross-entropy in 10 steps of ``epsilon / 4``
        and starts at ``attacks.gaussian(0.001)``.
      beta: of the divergence; 6 in the authors' code, 5 in the paper.
      moved_by: which batch moves the batch statistics: the clean one, then the attacked one unless given, as in the
        authors' code.

    Wang et al. 2020, https://openreview.net/forum?id=rklOg6EFwS; the constants are those of the authors' code.

    >>> import jaxnets as jn
    >>> from functools import partial
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = mart(net, partial(jn.attacks.pgd, threat=jn.Linf(0.1), start=jn.attacks.gaussian(0.001)))
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'clean_accuracy', 'divergence', 'loss']
    """

    def outer(
        params: Params, stats: Stats, batch: Batch, x_adv: Array, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, attacked, stats = statistics.passes(net, params, stats, batch.x, x_adv, key, moved_by=moved_by)
        boosted = jnp.mean(boosted_cross_entropy(attacked, batch.y))
        true = jnp.take_along_axis(jax.nn.softmax(logits), batch.y[:, None], axis=-1)[:, 0]
        divergence = jnp.mean(_floored_kl(attacked, logits) * (1.0000001 - true))
        value = boosted + beta * divergence
        more = {"clean_accuracy": accuracy(logits, batch.y), "divergence": divergence}
        return value, (stats, metrics_of(value, attacked, batch.y) | more)

    return MinMax(under(net, attack), outer)


def _floored_kl(logits: Array, target: Array) -> Array:
    """`losses.kl` with probabilities of ``logits`` no smaller than 1e-12."""
    p, log_p = jax.nn.softmax(target), jax.nn.log_softmax(target)
    return jnp.sum(p * (log_p - jnp.log(jax.nn.softmax(logits) + 1e-12)), axis=-1)
