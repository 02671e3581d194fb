"""Models made of models, for adversarial examples that are to fool one that the attacker does not have."""

import jax
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import as_pytree, checked_logits
from jaxnets.attacks.parts.stochastic import Stochastic, redrawn
from jaxnets.types import Array, LogitsFn


def ensemble(*logits_fns: LogitsFn) -> LogitsFn:
    """The mean of the logits of several models: ``z(x) = 1/M sum_m z_m(x)``.

    What fools many surrogates at once is likelier to fool another model. Where one of them is `Stochastic` the ensemble
    is, with the largest number of samples among them.

    Args:
      logits_fns: at least one, ``x[B, ...] -> logits[B, K]``, all with the same classes.

    Returns:
      a `LogitsFn` that is a pytree: new parameters in its members do not mean a new trace.

    Raises:
      ValueError: without models; when called, where they have different numbers of classes.

    Dong et al. 2018, https://arxiv.org/abs/1710.06081; Liu et al. 2017, https://arxiv.org/abs/1611.02770.

    >>> import jax.numpy as jnp
    >>> print(ensemble(lambda x: x, lambda x: 3 * x)(jnp.ones((1, 2))))
    [[2. 2.]]
    """
    if not logits_fns:
        raise ValueError("ensemble takes at least one model, got none")
    members = tuple(as_pytree(member) for member in logits_fns)
    random = [member for member in members if isinstance(member, Stochastic)]
    if not random:
        return Partial(_mean, members)
    return Stochastic(Partial(_mean_redrawn, members), random[0].key, max(member.samples for member in random))


def _mean(members: tuple[LogitsFn, ...], x: Array) -> Array:
    logits = [checked_logits(member(x), x) for member in members]
    if len({one.shape for one in logits}) > 1:
        raise ValueError(f"an ensemble's models need the same classes, got {[one.shape[1] for one in logits]}")
    return sum(logits[1:], logits[0]) / len(logits)


def _mean_redrawn(members: tuple[LogitsFn, ...], key: Array, x: Array) -> Array:
    keys = jax.random.split(key, len(members))
    return _mean(tuple(redrawn(member, keys[n : n + 1], 0) for n, member in enumerate(members)), x)
