"""Reasons to doubt a model before, and an attack's result after: what makes robustness look higher than it is."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.attacks.parts.calling import as_pytree, row_keys
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import cross_entropy
from jaxnets.types import Array, LogitsFn

BLACK_BOX = "square"
"""The stage of a cascade that takes no gradient."""


DRAWS = "the model draws: two calls gave different logits. Make it a Stochastic, and use the version rand"


class ModelWarning(UserWarning):
    """The model is such that attacks may be weaker than they seem."""


def check_model(key: Array, logits_fn: LogitsFn, x: Array | np.ndarray, y: Array | np.ndarray) -> list[str]:
    """Doubts about a model, a sentence each; none where there is no reason for any.

    Whether it draws, returns probabilities instead of logits, has zero gradients of the cross-entropy at some rows, or
    fewer than four classes (which targeted DLR needs).

    Args:
      key: of the draws of a `Stochastic` model; one, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]``.
      y: their classes ``[B]``.

    >>> check_model(jax.random.key(0), lambda x: jax.nn.softmax(x), jnp.eye(4), jnp.arange(4))[0][:35]
    'the model returns probabilities, no'
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    logits, gradient = map(np.asarray, _look(as_pytree(redrawn(logits_fn, row_keys(key, len(x)), 0)), x, y))
    blind = (gradient == 0).reshape(len(x), -1).all(axis=1).mean()
    doubts = {
        DRAWS: _draws(key, logits_fn, x),
        "the model returns probabilities, not logits: gradients vanish where it is sure. Attack what comes before the "
        "softmax": _are_probabilities(logits),
        f"the gradient of the cross-entropy is zero at {blind:.0%} of the rows: white-box attacks may be blind there, "
        "and the result too good": blind > 0,
        f"the model has {logits.shape[-1]} classes: targeted DLR needs 4 and is left out": logits.shape[-1] < 4,
    }
    return [sentence for sentence, holds in doubts.items() if holds]


def black_box_wins(survived: Mapping[str, np.ndarray]) -> list[str]:
    """A sentence where Square broke rows that all attacks before it had left, as one list for warnings.

    Args:
      survived: by attack of a cascade, in order, whether each row survived it and those before, bool ``[N]``.
    """
    names = list(survived)
    if BLACK_BOX not in names[1:]:
        return []
    before, after = survived[names[names.index(BLACK_BOX) - 1]], survived[BLACK_BOX]
    won = int((before & ~after).sum())
    if not won:
        return []
    return [
        f"Square, which takes no gradient, broke {won} rows that the white-box attacks before it had left: gradients "
        "may be masked"
    ]


@jax.jit
def _look(logits_fn: Any, x: Array, y: Array) -> tuple[Array, Array]:
    gradient, logits = input_gradient(logits_fn, cross_entropy, x, y)
    return logits, gradient


def _draws(key: Array, logits_fn: LogitsFn, x: Array) -> bool:
    """Two draws, each traced by itself: randomness that is no argument is fixed when a function is traced."""
    keys, logits_fn = row_keys(key, len(x)), as_pytree(logits_fn)
    first, second = (_drawn(logits_fn, keys, x, draw=draw) for draw in (0, 1))
    return not np.array_equal(first, second, equal_nan=True)


@partial(jax.jit, static_argnames="draw")
def _drawn(logits_fn: LogitsFn, keys: Array, x: Array, *, draw: int) -> Array:
    return redrawn(logits_fn, keys, draw)(x)


def _are_probabilities(logits: np.ndarray) -> bool:
    return bool((logits >= 0).all() and np.allclose(logits.sum(axis=-1), 1, atol=1e-4))
