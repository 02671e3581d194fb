"""Threats over batches: one example's verbs applied to every row."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.threats.threat import Threat
from jaxnets.types import Array


def check_one_a_row(x: Array, **values: Any) -> None:
    """Raises ValueError unless every one of ``values`` is a scalar or ``[B]``, and for an epsilon below 0 or NaN.

    That of an array on a device is not looked at, which would wait for it.
    """
    epsilon = values.get("epsilon", 0)
    if not isinstance(epsilon, jax.Array) and not np.all(np.greater_equal(epsilon, 0)):
        raise ValueError(f"epsilon must be 0 or more, got {epsilon}")
    for name, value in values.items():
        if jnp.shape(value) not in ((), (len(x),)):
            raise ValueError(
                f"{name} must be a scalar or have one entry for each of the {len(x)} rows, got {jnp.shape(value)}"
            )


def a_row(value: Any, x: Array) -> Array:
    """One value a row, ``[B]``, of the type of ``x[B, ...]``."""
    return jnp.broadcast_to(jnp.asarray(value, x.dtype), len(x))


def each_row(verb: Callable[..., Array], threat: Threat, *arguments: Array) -> Array:
    """Applies ``verb(threat, ...)`` to every row of ``arguments[B, ...]``; ``epsilon`` is a scalar or ``[B]``.

    The results keep the type of the last argument, whatever that of ``epsilon``; half precision is computed in single,
    for squares and sums of it overflow.

    >>> from jaxnets import Linf
    >>> x = jnp.zeros((2, 3))
    >>> each_row(Linf.project, Linf(jnp.array([0.1, 0.2])), x + 1, x)[:, 0]
    Array([0.1, 0.2], dtype=float32)
    """
    check_one_a_row(arguments[0], epsilon=threat.epsilon)
    dtype = arguments[-1].dtype
    arguments = tuple(map(_in_single, arguments))
    threat = replace(threat, epsilon=a_row(threat.epsilon, arguments[-1]))  # pyright: ignore
    return jax.vmap(verb)(threat, *arguments).astype(dtype)


def _in_single(array: Array) -> Array:
    """The array, in single precision where it is in less."""
    return array.astype(jnp.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else array


def sizes(threat: Threat, x_adv: Array, x: Array) -> Array:
    """The size of every row's perturbation, ``[B]``, for ``x_adv[B, ...]`` and ``x[B, ...]``."""
    return jax.vmap(threat.size)(x_adv - x)
