"""Objectives in two halves: an attack, and what training lowers with the attack's result held fixed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxnets.classifier import Classifier
from jaxnets.types import Array, Batch, LogitsFn, Metrics, Objective, Params, Stats

Inner = Callable[[Params, Stats, Batch, Array], Any]
"""``(params, stats, batch, key) -> examples``, any pytree."""
Outer = Callable[[Params, Stats, Batch, Any, Array], tuple[Array, tuple[Stats, Metrics]]]
"""``(params, stats, batch, examples, key) -> (scalar, (stats, metrics))``."""


@dataclass(frozen=True)
class MinMax:
    """The objective ``outer(theta, examples)`` at ``examples = inner(theta)``; wrappers such as `awp` take it apart.

    By Danskin's theorem the gradient of a maximum is the gradient at the maximiser, so none flows through ``inner``.
    The key is split into one for each half.

    Attributes:
      inner: the attack; it touches neither parameters nor statistics.
      outer: what training lowers.

    >>> import jax.numpy as jnp
    >>> game = MinMax(lambda w, *_: w + 1, lambda w, stats, batch, x_adv, key: (w * x_adv, (stats, {})))
    >>> print(jax.grad(game, has_aux=True)(2.0, {}, None, jax.random.key(0))[0])
    3.0
    """

    inner: Inner
    outer: Outer

    def __call__(self, params: Params, stats: Stats, batch: Batch, key: Array) -> tuple[Array, tuple[Stats, Metrics]]:
        inner_key, outer_key = jax.random.split(key)
        # Stopped before the attack and not after it: steps whose derivatives nobody asks for keep nothing in memory.
        examples = self.inner(*jax.lax.stop_gradient((params, stats)), batch, inner_key)
        return self.outer(params, stats, batch, examples, outer_key)


def halves(objective: Objective) -> MinMax:
    """The objective in its halves; one that has none attacks nothing."""
    if isinstance(objective, MinMax):
        return objective
    return MinMax(
        lambda params, stats, batch, key: (),
        lambda params, stats, batch, examples, key: objective(params, stats, batch, key),
    )


def under(net: Classifier, attack: Callable[[Array, LogitsFn, Array, Array], Any]) -> Inner:
    """The half of an attack ``(key, logits_fn, x, y) -> examples`` on the network in inference mode."""
    return lambda params, stats, batch, key: attack(key, net.logits_fn(params, stats), batch.x, batch.y)
