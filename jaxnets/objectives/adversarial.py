"""Minimax adversarial training."""

from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives import statistics
from jaxnets.objectives.minmax import MinMax, under
from jaxnets.objectives.standard import standard
from jaxnets.objectives.statistics import MovedBy
from jaxnets.types import Array, Attack, Batch, Loss, Metrics, Objective, Params, Stats


def adversarial(
    net: Classifier,
    attack: Attack,
    *,
    loss: Loss = cross_entropy,
    on_attacked: Objective | None = None,
    moved_by: MovedBy = statistics.attacked,
) -> MinMax:
    """The mean loss on attacked rows: ``min_theta 1/B sum_i max_{delta in threat} loss(f_theta(x_i + delta), y_i)``.

    The attack sees the network in inference mode and touches neither parameters nor statistics; by Danskin's theorem
    the gradient of the maximum is the gradient at the maximiser, so none flows through the attack. The metric
    ``accuracy`` is that on the attacked rows.

    Args:
      net: as for `standard`.
      attack: the inner maximisation.
      loss: what training lowers; the attack raises its own.
      on_attacked: what the attacked batch is given to, in place of `standard` with ``loss``; `auxiliary` of a network
        with heads in its middle.
      moved_by: which batch moves the batch statistics: the attacked one alone unless given. `statistics.clean` and
        `statistics.both` cost a forward pass.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083.

    >>> import jax, jax.numpy as jnp, jaxnets as jn
    >>> from functools import partial
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = adversarial(net, partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=7))
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'loss']
    """
    on_batch = on_attacked or standard(net, loss=loss)

    def outer(
        params: Params, stats: Stats, batch: Batch, x_adv: Array, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        def on_rows(stats: Stats) -> tuple[tuple[Array, Metrics], Stats]:
            value, (stats, metrics) = on_batch(params, stats, Batch(x_adv, batch.y), key)
            return (value, metrics), stats

        _, (value, metrics), stats = moved_by(lambda stats: net.train(params, stats, batch.x, key), on_rows, stats)
        return value, (stats, metrics)

    return MinMax(under(net, attack), outer)
