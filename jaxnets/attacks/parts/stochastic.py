"""Models that draw: attacks on them average gradients over draws (expectation over transformation)."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, checked_logits, row_keys
from jaxnets.types import Array, LogitsFn

_DRAWS = 2**31
"""Of the model alone: a row's key is split for starts and directions, and its children are its first foldings."""


@dataclass(frozen=True)
class Stochastic:
    """A `LogitsFn` that draws: ``model(key, x[B, ...]) -> logits[B, K]``, a pytree.

    Every row draws with a key of its own, so that it does not see its batch. Attacks draw anew at every step, and take
    the mean gradient of ``samples`` draws: Athalye et al. 2018, https://arxiv.org/abs/1802.00420.

    Attributes:
      model: the random classifier.
      key: what a call outside an attack draws with; one key, or one a row.
      samples: draws per gradient, at least 1; static.

    Raises:
      ValueError: for fewer than one draw.

    >>> noisy = Stochastic(lambda key, x: x + jax.random.normal(key, x.shape), jax.random.key(0), samples=8)
    >>> noisy(jnp.zeros((2, 3))).shape
    (2, 3)
    """

    model: Any
    key: Array
    samples: int = 1

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"a Stochastic model takes at least one draw, got samples={self.samples}")

    def __call__(self, x: Array) -> Array:
        return jax.vmap(lambda key, row: self.model(key, row[None])[0])(row_keys(self.key, len(x)), x)

    def draw(self, number: Any, rows: int) -> "Stochastic":
        """The same model with other randomness."""
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys(self.key, rows), number)
        return replace(self, key=keys)


def _flatten(model: Stochastic):
    return (as_pytree(model.model), model.key), model.samples


jax.tree_util.register_pytree_node(Stochastic, _flatten, lambda samples, leaves: Stochastic(*leaves, samples))


def redrawn(logits_fn: LogitsFn, keys: Array, step: Any) -> LogitsFn:
    """The model of an attack's step: a `Stochastic` one draws from the rows' keys, any other is as it was."""
    if not isinstance(logits_fn, Stochastic):
        return logits_fn
    return replace(logits_fn, key=keys).draw(_DRAWS, len(keys)).draw(step, len(keys))


def expected_logits(logits_fn: LogitsFn, x: Array) -> Array:
    """The logits ``[B, K]``, of a `Stochastic` model their mean over its draws: what attacks judge their points by."""
    if not isinstance(logits_fn, Stochastic):
        return checked_logits(logits_fn(x), x)
    return mean_over_draws(lambda model: checked_logits(model(x), x), logits_fn, len(x))


def mean_over_draws(function: Any, model: Stochastic, rows: int) -> Any:
    """The mean of ``function(model)``, a pytree of floats, over the model's draws, one after the other."""
    if model.samples == 1:
        return function(model)

    def add(number, sums):
        return jax.tree.map(jnp.add, sums, function(model.draw(number, rows)))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, model))
    sums = jax.lax.fori_loop(0, model.samples, add, zeros)
    return jax.tree.map(lambda leaf: leaf / model.samples, sums)
