"""What every attack does with its arguments: row keys, callables as pytrees, and the checks at the boundary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnets.draws import threefry
from jaxnets.threats import Threat
from jaxnets.types import Array


def row_keys(key: Array, rows: int) -> Array:
    """One key a row, which depends on the row's place alone and not on how many rows there are.

    ``key`` is one key, or one key a row already (``[B]``), by which a row keeps its key in whatever batch it comes.
    Keys of another implementation than threefry give keys of that, for they cannot draw row by row.

    Raises:
      ValueError: for an array of keys whose length is not ``rows``.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    key = threefry(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key must be one key or one for each of the {rows} rows, got shape {key.shape}")
    return key


def as_pytree(function: Callable[..., Any]) -> Any:
    """A callable that jitted functions take as an argument: new arrays inside it do not mean a new trace."""
    return Partial(function) if jax.tree_util.all_leaves((function,)) else function


def check_steps(name: str, steps: int) -> None:
    """Raises ValueError for fewer than one step."""
    if steps < 1:
        raise ValueError(f"{name} takes at least one step, got steps={steps}")


def check_between(low: float, high: float, **values: Any) -> None:
    """Raises ValueError unless each is one number for all rows, between the two. On devices none is looked at."""
    for name, value in values.items():
        if jnp.shape(value):
            raise ValueError(f"{name} must be one number for all rows, got shape {list(jnp.shape(value))}")
        if not isinstance(value, jax.Array) and not low < value < high:
            raise ValueError(f"{name} must be above {low:g} and below {high:g}, got {value}")


def check_finite(name: str, threat: Threat) -> None:
    """Raises ValueError for an infinite epsilon: steps and starts are shares of it. On devices none is looked at."""
    if not isinstance(threat.epsilon, jax.Array) and np.isinf(threat.epsilon).any():
        raise ValueError(f"{name} goes in shares of epsilon, which must be finite, got {threat}")


def check_rows(x: Array, target: Array) -> None:
    """Raises ValueError unless ``x`` is a float batch ``[B, ...]`` and ``target`` has ``B`` rows."""
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a float array of rows [B, ...], got {x.dtype}{list(x.shape)}")
    if target.ndim not in (1, 2) or len(target) != len(x):
        raise ValueError(
            f"target must be [B] or [B, K] with B = {len(x)} rows as x has, got shape {list(target.shape)}"
        )


def checked_logits(logits: Array, x: Array) -> Array:
    """The logits in at least single precision, of the values that they have in less.

    Raises ValueError unless they are ``[B, K]``.
    """
    if logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(f"logits_fn must return [B, K] with B = {len(x)} rows as x has, got {list(logits.shape)}")
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if wide.dtype == logits.dtype:
        return wide
    # Compilers leave out a rounding that is undone at once: attacks would stop where the next program still sees a tie.
    kind = jnp.finfo(logits.dtype)
    return jax.lax.reduce_precision(wide, kind.nexp, kind.nmant)
