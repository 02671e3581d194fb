"""The nouns of jaxnets: what the functions of every other module take and return.

Shapes: ``B`` rows in a batch, ``K`` classes, ``...`` any leading axes. Images are channels last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Params = Any
"""A pytree of trainable arrays."""
Stats = Any
"""A pytree of arrays that move with the data and are not trained, such as batch-norm averages."""
Metrics = dict[str, Array]
"""Scalars that a training step reports."""

LogitsFn = Callable[[Array], Array]
"""``x[B, ...] -> logits[B, K]``: any JAX callable."""

Loss = Callable[[Array, Array], Array]
"""``(logits[..., K], target) -> [...]``: never reduced over the batch; higher is worse for the model.

``target`` holds integer classes ``[...]`` or, where the loss says so, a distribution or logits ``[..., K]``.
"""


class Attack(Protocol):
    """``(key, logits_fn, x[B, ...], target) -> x_adv[B, ...]``: a pure function, configured by `functools.partial`."""

    def __call__(self, key: Array, logits_fn: LogitsFn, x: Array, target: Array, /) -> Array: ...


class Batch(NamedTuple):
    """Rows of data: ``x[B, ...]`` float in data space and ``y[B]`` integer classes."""

    x: Array
    y: Array


Objective = Callable[[Params, Stats, Batch, Array], tuple[Array, tuple[Stats, Metrics]]]
"""``(params, stats, batch, key) -> (scalar, (stats, metrics))``: what ``jax.value_and_grad(has_aux=True)`` wants."""
