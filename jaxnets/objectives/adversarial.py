"""Minimax adversarial training."""

import jax

from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives.standard import standard
from jaxnets.types import Array, Attack, Batch, Loss, Metrics, Objective, Params, Stats


def adversarial(
    net: Classifier, attack: Attack, *, loss: Loss = cross_entropy, on_attacked: Objective | None = None
) -> Objective:
    """The mean loss on attacked rows: ``min_theta 1/B sum_i max_{delta in threat} loss(f_theta(x_i + delta), y_i)``.

    The attack sees the network in inference mode and touches neither parameters nor statistics; by Danskin's theorem
    the gradient of the maximum is the gradient at the maximiser, so none flows through the attack. Batch statistics
    move with the attacked batch alone. The metric ``accuracy`` is that on the attacked rows.

    Args:
      net: as for `standard`.
      attack: the inner maximisation.
      loss: what training lowers; the attack raises its own.
      on_attacked: what the attacked batch is given to, in place of `standard` with ``loss``; `auxiliary` of a network
        with heads in its middle.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083.
    """
    on_batch = on_attacked or standard(net, loss=loss)

    def objective(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        attack_key, train_key = jax.random.split(key)
        model = net.logits_fn(*jax.lax.stop_gradient((params, stats)))
        x_adv = jax.lax.stop_gradient(attack(attack_key, model, batch.x, batch.y))
        return on_batch(params, stats, Batch(x_adv, batch.y), train_key)

    return objective
