"""Attacks that do not look at the label."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax.numpy as jnp

from jaxnets.attacks.parts.queries import counts_queries, with_queries
from jaxnets.attacks.parts.stochastic import expected_logits
from jaxnets.types import Array, LogitsFn


def on_prediction(attack: Callable[..., Array]) -> Callable[..., Array]:
    """The attack with the class that the model predicts at the clean row as its target, whatever the row's label.

    Training on attacks of one step on the label learns to tell the label by the perturbation (label leaking: attacked
    rows are classified better than clean ones). This perturbation tells no more than the model knows. It costs a
    forward pass.

    Args:
      attack: untargeted; options that the result is called with are handed on to it. Its queries are counted as
        before, the clean row's prediction is none of them.

    Kurakin et al. 2017, https://arxiv.org/abs/1611.01236, section 4.1.

    >>> import jax, jaxnets as jn
    >>> x, y = jnp.array([[0.4, 0.5]]), jnp.array([0])
    >>> attack = on_prediction(jn.attacks.fgsm)
    >>> print(attack(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1)))
    [[0.5 0.4]]
    """

    counting = with_queries(attack)

    @wraps(attack)
    def blind(key: Array, logits_fn: LogitsFn, x: Array, target: Array, **options: Any) -> Any:
        predicted = jnp.argmax(expected_logits(logits_fn, x), axis=-1)
        return (counting or attack)(key, logits_fn, x, predicted, **options)

    return counts_queries(blind) if counting else blind
