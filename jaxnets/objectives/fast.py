"""One-step adversarial training: FGSM from a random start, and from stronger noise that no ball clips."""

from dataclasses import replace
from functools import partial
from typing import Any

from jax.tree_util import Partial

from jaxnets.attacks.gradient import fgsm
from jaxnets.attacks.parts.start import Start, uniform
from jaxnets.classifier import Classifier
from jaxnets.losses import cross_entropy
from jaxnets.objectives import statistics
from jaxnets.objectives.adversarial import adversarial
from jaxnets.objectives.minmax import MinMax
from jaxnets.objectives.statistics import MovedBy
from jaxnets.threats import Threat
from jaxnets.types import Array, Loss


def fast(
    net: Classifier,
    threat: Threat,
    *,
    start: Start,
    step_size: Any = None,
    loss: Loss = cross_entropy,
    moved_by: MovedBy = statistics.attacked,
) -> MinMax:
    """`adversarial` against one step of `attacks.fgsm` from a random start (FGSM-RS).

    It may overfit catastrophically: the network learns to survive this attack and no other. That is what
    `diagnostics.overfitting_guard` watches for.

    Args:
      net, moved_by: as for `adversarial`.
      threat: ball and box.
      start: the authors' code for MNIST takes the gradient at `attacks.uniform_unclipped`, that for CIFAR-10 at
        `attacks.uniform`, cut to the box. On images with much black it decides: from a clipped start a step fills the
        background up, by which the network learns to tell the label.
      step_size: in the threat's norm; ``1.25 epsilon`` unless given.
      loss: raised by the attack and lowered by training.

    Wong et al. 2020, https://arxiv.org/abs/2001.03994.

    >>> import jax, jax.numpy as jnp, jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP(())), jn.types.Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = fast(net, jn.Linf(8 / 255), start=jn.attacks.uniform)
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'loss']
    """
    step_size = 1.25 * threat.epsilon if step_size is None else step_size
    attack = partial(fgsm, threat=threat, step_size=step_size, start=start, loss=loss)
    return adversarial(net, attack, loss=loss, moved_by=moved_by)


def n_fgsm(
    net: Classifier,
    threat: Threat,
    *,
    noise: Any = 2.0,
    step_size: Any = None,
    loss: Loss = cross_entropy,
    moved_by: MovedBy = statistics.attacked,
) -> MinMax:
    """`adversarial` against ``clip(x_0 + step_size * direction(grad loss(x_0)))`` from noise ``x_0`` (N-FGSM).

    ``x_0`` is drawn from the ball of radius ``noise epsilon`` and clipped to the box. The result is clipped to the box
    too and not to the ball: it is up to ``noise epsilon + step_size`` away. So strong a noise keeps one-step training
    from overfitting catastrophically.

    Args:
      net, moved_by: as for `adversarial`.
      threat: ball and box.
      noise: radius of the noise in units of epsilon; 2 in the paper.
      step_size: in the threat's norm; epsilon unless given.
      loss: raised by the attack and lowered by training.

    de Jorge et al. 2022, https://arxiv.org/abs/2202.01181.

    >>> import jax, jax.numpy as jnp, jaxnets as jn
    >>> net, batch = jn.from_linen(jn.models.MLP(())), jn.types.Batch(jnp.ones((2, 3)), jnp.array([1, 2]))
    >>> objective = n_fgsm(net, jn.Linf(8 / 255))
    >>> _, (_, metrics) = jax.eval_shape(lambda key: objective(*net.init(key, batch.x), batch, key), jax.random.key(0))
    >>> list(metrics)
    ['accuracy', 'loss']
    """
    step_size = threat.epsilon if step_size is None else step_size
    radius = noise * threat.epsilon
    wide = replace(threat, epsilon=radius + step_size)  # pyright: ignore
    attack = partial(fgsm, threat=wide, step_size=step_size, start=Partial(_within, radius), loss=loss)
    return adversarial(net, attack, loss=loss, moved_by=moved_by)


def _within(radius: Any, keys: Array, threat: Threat, x: Array) -> Array:
    return uniform(keys, replace(threat, epsilon=radius), x)  # pyright: ignore
