"""Certified training: what is lowered is an upper bound of the loss everywhere in the threat."""

import jax
import jax.numpy as jnp

from jaxnets.certificates import crown_margins, interval_margins
from jaxnets.certificates.rows import Margins, margins_within
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives.standard import metrics_of, passed
from jaxnets.threats import Threat
from jaxnets.types import Array, Batch, Loss, Metrics, Objective, Params, Stats


def ibp(
    net: Classifier,
    threat: Threat,
    *,
    kappa: float | Array = 0.5,
    loss: Loss = cross_entropy,
    margins: Margins = interval_margins,
) -> Objective:
    """Interval bound propagation: ``1/B sum_i kappa loss(f(x_i), y_i) + (1 - kappa) loss(-m(x_i), y_i)``.

    ``m_k`` is a lower bound of ``z_y - z_k`` in the threat: the logits ``-m`` are the worst that the bounds allow, and
    the second loss is never below that of any attack in the threat. At first bounds are far too wide to train by: the
    paper raises epsilon from 0 while it lowers ``kappa`` from 1 to 1/2, see `training.scheduled`.

    The clean term is that of `standard`; bounds are those of the network in inference mode, at the statistics from
    before the step. The metric ``accuracy`` is the clean one, ``certified`` the share of rows whose margins are above
    zero.

    Args:
      net: of operations that `certificates.interval_bounds` has rules for.
      threat: `Linf`, `Masked`, `L2` or `L1`; its epsilon may be traced.
      kappa: weight of the clean term.
      loss: of both terms, such that lower margins mean more of it.
      margins: bounds of the margins.

    Raises:
      NotImplementedError, ValueError: as `certificates.certified` does.

    Gowal et al. 2018, https://arxiv.org/abs/1810.12715.

    >>> import jax, jaxnets as jn
    >>> net = jn.from_linen(jn.models.MLP((), classes=2))
    >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(2)}}
    >>> batch = Batch(jnp.array([[0.5]]), jnp.array([0]))
    >>> value, (_, metrics) = ibp(net, jn.Linf(0.5), kappa=0.0)(params, {}, batch, jax.random.key(0))
    >>> print(value, metrics["accuracy"], metrics["certified"])
    0.6931472 1.0 0.0
    """

    def objective(params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        least = margins_within(margins, net.logits_fn(params, stats), threat, batch.x, batch.y)
        logits, stats = passed(net, params, stats, batch.x, key)
        clean, worst = jnp.mean(loss(logits, batch.y)), jnp.mean(loss(-least, batch.y))
        value = kappa * clean + (1 - kappa) * worst
        held = jnp.all((least > 0) | (jnp.arange(least.shape[1]) == batch.y[:, None]), axis=1)
        return value, (stats, metrics_of(value, logits, batch.y) | {"certified": jnp.mean(held)})

    return objective


def crown_ibp(
    net: Classifier, threat: Threat, *, beta: float | Array, kappa: float | Array = 0.5, loss: Loss = cross_entropy
) -> Objective:
    """`ibp` with the margins ``(1 - beta) interval_margins + beta crown_margins``.

    Bounds by CROWN are tighter where neurons are unstable, as in a network that is not trained yet: training begins
    with ``beta`` at 1. Those of intervals are as tight once the network is trained to them: the paper lets ``beta``
    fall to 0 while epsilon rises. From then on they are not computed, and a step costs what one of `ibp` does.

    Args:
      beta: share of CROWN's margins, in [0, 1].
      net, threat, kappa, loss: as for `ibp`.

    Zhang et al. 2020, https://arxiv.org/abs/1906.06316.
    """

    def mixed(*arguments, norm: float) -> Array:
        of_intervals = interval_margins(*arguments, norm=norm)
        return jax.lax.cond(
            jnp.asarray(beta > 0),
            # Kept for the gradient they would be written as zeros by the other branch.
            jax.checkpoint(lambda: (1 - beta) * of_intervals + beta * crown_margins(*arguments, norm=norm)),
            lambda: of_intervals,
        )

    return ibp(net, threat, kappa=kappa, loss=loss, margins=mixed)
