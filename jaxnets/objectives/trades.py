"""TRADES: accuracy on clean rows, and predictions that do not change under attack."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxnets.attacks.parts.calling import checked_logits
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy, kl
from jaxnets.objectives import statistics
from jaxnets.objectives.minmax import MinMax, under
from jaxnets.objectives.standard import accuracy, metrics_of
from jaxnets.objectives.statistics import MovedBy
from jaxnets.types import Array, Batch, LogitsFn, Loss, Metrics, Params, Stats


def trades(
    net: Classifier,
    attack: Callable[..., Array],
    *,
    beta: float = 6.0,
    loss: Loss = cross_entropy,
    moved_by: MovedBy = statistics.both,
) -> MinMax:
    """``1/B sum_i loss(f(x_i), y_i) + beta/B sum_i KL(p(x_i) || p(x_i'))``, with ``x_i'`` where the divergence is most.

    The gradient flows through both sides of the divergence; the attack takes the clean prediction as fixed. The metric
    ``accuracy`` is that on the attacked rows, ``clean_accuracy`` on the clean ones.

    Args:
      net: as for `standard`.
      attack: ``(key, logits_fn, x, target, *, loss) -> x_adv``, given `losses.kl` and the clean logits as its target,
        whatever loss it was bound to. It must start off the clean rows, where the divergence has no gradient: the
        authors' `attacks.pgd` with ``start=attacks.gaussian(0.001)``, 10 steps of ``epsilon / 4``.
      beta: of the divergence; 6 for the authors' best network, 1 for their most accurate.
      loss: on the clean rows.
      moved_by: which batch moves the batch statistics: the clean one, then the attacked one unless given. The authors'
        code passes the clean one a second time.

    Zhang et al. 2019, https://arxiv.org/abs/1901.08573.

    >>> import jax, jaxnets as jn
    >>> from functools import partial
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = trades(net, partial(jn.attacks.pgd, threat=jn.Linf(0.1), start=jn.attacks.gaussian(0.001)))
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'clean_accuracy', 'divergence', 'loss']
    """

    def from_clean(key: Array, model: LogitsFn, x: Array, y: Array) -> Array:
        return attack(key, model, x, checked_logits(model(x), x), loss=kl)

    def outer(
        params: Params, stats: Stats, batch: Batch, x_adv: Array, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, attacked, stats = statistics.passes(net, params, stats, batch.x, x_adv, key, moved_by=moved_by)
        divergence = jnp.mean(kl(attacked, logits))
        value = jnp.mean(loss(logits, batch.y)) + beta * divergence
        more = {"clean_accuracy": accuracy(logits, batch.y), "divergence": divergence}
        return value, (stats, metrics_of(value, attacked, batch.y) | more)

    return MinMax(under(net, from_clean), outer)
