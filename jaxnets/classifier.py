"""The bridge from Flax: a network as a tuple of pure functions."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from jax.tree_util import Partial

from jaxnets.types import Array, Params, Stats


class Classifier(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: ``(key, x[B, ...]) -> (params, stats)``.
      infer: ``(params, stats, x) -> logits[B, K]``, in inference mode: nothing is random, no statistics move.
      train: ``(params, stats, x, key) -> (logits, stats)``: batch statistics move, dropout draws from ``key``.
    """

    init: Callable[[Array, Array], tuple[Params, Stats]]
    infer: Callable[[Params, Stats, Array], Array]
    train: Callable[[Params, Stats, Array, Array], tuple[Array, Stats]]

    def logits_fn(self, params: Params, stats: Stats) -> Partial:
        """``x -> logits`` that is itself a pytree: a jitted attack takes new parameters without a new trace."""
        return Partial(self.infer, params, stats)


def from_linen(module: nn.Module) -> Classifier:
    """A `Classifier` of a Linen module.

    Where the module's ``__call__`` has an argument ``train`` it is true in training and false in inference; an argument
    ``deterministic`` is the opposite. All collections but ``params`` are statistics; randomness is drawn from the
    stream ``dropout``.

    >>> import jax, jax.numpy as jnp
    >>> net = from_linen(nn.Dense(3))
    >>> params, stats = net.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> net.logits_fn(params, stats)(jnp.ones((2, 4))).shape
    (2, 3)
    """
    arguments = inspect.signature(type(module).__call__).parameters

    def mode(training: bool) -> dict[str, Any]:
        if "train" in arguments:
            return {"train": training}
        return {"deterministic": not training} if "deterministic" in arguments else {}

    def init(key: Array, x: Array) -> tuple[Params, Stats]:
        variables = dict(module.init(key, x, **mode(False)))
        return variables.pop("params", {}), variables

    def infer(params: Params, stats: Stats, x: Array) -> Array:
        return module.apply({"params": params, **stats}, x, **mode(False))  # pyright: ignore[reportReturnType]

    def train(params: Params, stats: Stats, x: Array, key: Array) -> tuple[Array, Stats]:
        logits, moved = module.apply(
            {"params": params, **stats}, x, rngs={"dropout": key}, mutable=list(stats), **mode(True)
        )
        return logits, dict(moved)

    return Classifier(init, infer, train)
