"""Virtual adversarial training: predictions that do not change in their most sensitive direction, labels or not."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import check_steps, checked_logits, row_keys
from jaxnets.classifier import Classifier
from jaxnets.draws import drawn
from jaxnets.losses import cross_entropy, is_right, kl
from jaxnets.objectives import statistics
from jaxnets.objectives.directions import unit
from jaxnets.objectives.minmax import MinMax, under
from jaxnets.objectives.statistics import MovedBy
from jaxnets.threats import Threat, each_row
from jaxnets.types import Array, Batch, LogitsFn, Loss, Metrics, Params, Stats


def virtual_adversarial(
    net: Classifier,
    threat: Threat,
    *,
    iterations: int = 1,
    weight: Any = 1.0,
    loss: Loss = cross_entropy,
    moved_by: MovedBy = statistics.clean,
) -> MinMax:
    """``mean loss(f(x), y) + weight mean KL(p(x) || p(x + r))``, ``r`` where the divergence grows fastest (VAT).

    The divergence's Hessian in ``r`` at 0 is ``J^T F J``, with ``J`` the Jacobian of the logits and ``F = diag(p) - p
    p^T``; ``iterations`` of ``d <- J^T F J d / |J^T F J d|`` from a random ``d`` turn it to the first eigenvector, and
    ``r`` is epsilon of it. The paper takes the product by a difference of gradients at ``xi d``; here it is the limit
    at ``xi = 0``, which in single precision no difference can come near. No gradient flows through ``p(x)``.

    Rows whose class is below 0 have no label: they count in the divergence alone. The first mean, and the metric
    ``accuracy``, are over the other rows, which are clean.

    Args:
      net: as for `standard`.
      threat: length of ``r`` and its norm, L2 in the paper; ``x + r`` is projected onto its box, ``L2(epsilon,
        -inf, inf)`` for none.
      iterations: of the power method, at least 1, each a forward and a backward pass; 1 in the paper.
      weight: alpha, of the divergence; 1 in the paper.
      loss: on the rows as they are.
      moved_by: which batch moves the batch statistics: the clean one alone unless given, as in the authors' code.

    Raises:
      ValueError: for fewer than one iteration.

    Miyato et al. 2018, https://arxiv.org/abs/1704.03976.

    >>> import jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP(())), Batch(jnp.ones((2, 3)), jnp.array([1, -1]))
    >>> objective = virtual_adversarial(net, jn.L2(2.0))
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'divergence', 'loss']
    """
    check_steps("virtual_adversarial", iterations)

    def sensitive(key: Array, model: LogitsFn, x: Array, y: Array) -> Array:
        return _most_sensitive(key, model, x, threat, iterations)

    def outer(
        params: Params, stats: Stats, batch: Batch, x_adv: Array, key: Array
    ) -> tuple[Array, tuple[Stats, Metrics]]:
        logits, attacked, stats = statistics.passes(net, params, stats, batch.x, x_adv, key, moved_by=moved_by)
        divergence = jnp.mean(kl(attacked, jax.lax.stop_gradient(logits)))
        labelled = jnp.all(batch.y.reshape(len(batch.y), -1) >= 0, axis=1)
        count = jnp.maximum(jnp.sum(labelled), 1)
        # A class that is there, for a loss of one that is not has a gradient of NaN.
        y = jnp.where(labelled.reshape(-1, *[1] * (batch.y.ndim - 1)), batch.y, 0)
        value = jnp.sum(jnp.where(labelled, loss(logits, y), 0)) / count + weight * divergence
        right = jnp.mean(is_right(logits, y) & labelled) * len(y) / count
        return value, (stats, {"loss": value, "accuracy": right, "divergence": divergence})

    return MinMax(under(net, sensitive), outer)


def _most_sensitive(key: Array, model: LogitsFn, x: Array, threat: Threat, iterations: int) -> Array:
    """``x + r``, every row's direction ``[B, ...]`` by the power method."""

    def logits(z: Array) -> Array:
        return checked_logits(model(z), z)

    units, noise = jax.vmap(unit), jax.vmap(lambda key, row: drawn(jax.random.normal, key, row.shape, row.dtype))
    _, through = jax.vjp(lambda z: jax.nn.softmax(logits(z)), x)

    def turn(_, d: Array) -> Array:
        u = jax.jvp(logits, (x,), (d,))[1]
        # through(u) is J^T (diag(p) - p p^T) u: the Jacobian of the softmax is F.
        return units(through(u)[0])

    d = jax.lax.fori_loop(0, iterations, turn, units(noise(row_keys(key, len(x)), x)))
    return each_row(_moved, threat, d, x)


def _moved(threat: Threat, d: Array, x: Array) -> Array:
    return threat.project(x + threat.epsilon * threat.direction(d, x), x)
