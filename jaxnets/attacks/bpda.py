"""Backward pass differentiable approximation: a stage without a useful derivative, given that of another function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.types import Array


def _same(x: Array) -> Array:
    return x


def bpda(forward: Callable[[Array], Array], backward: Callable[[Array], Array] = _same) -> Callable[[Array], Array]:
    """A function whose value is ``forward(x)`` and whose derivative is that of ``backward`` at ``x``.

    Put it in place of the stage of a defence that rounds, compresses, draws a median or calls a program (through
    `jax.pure_callback`), and any attack of `jaxnets.attacks` passes through. It works with grad, jvp, vmap and jit, and
    is a pytree: arrays inside ``forward`` and ``backward`` (where these are `jax.tree_util.Partial`) are its leaves.

    Args:
      forward: the stage as it is.
      backward: a differentiable stand-in with results of the same shape and dtype; the identity unless given.

    Returns:
      A callable that is a pytree.

    Raises:
      ValueError: when called, where results differ in shape or dtype.

    Athalye et al. 2018, https://arxiv.org/abs/1802.00420, section 4.1.

    >>> print(jax.grad(lambda x: bpda(jnp.round)(x) ** 2)(0.75), jax.grad(lambda x: jnp.round(x) ** 2)(0.75))
    2.0 0.0
    """
    return Partial(_bpda, as_pytree(forward), as_pytree(backward))


@jax.custom_jvp
def _bpda(forward: Any, backward: Any, x: Array) -> Array:
    x = jnp.asarray(x)
    result = forward(x)
    stand_in = jax.eval_shape(backward, x)
    if (result.shape, result.dtype) != (stand_in.shape, stand_in.dtype):
        raise ValueError(
            f"bpda needs results alike, got {result.dtype}{list(result.shape)} from forward and "
            f"{stand_in.dtype}{list(stand_in.shape)} from backward"
        )
    return result


@_bpda.defjvp
def _derivative(primals, tangents):
    forward, backward, x = primals
    _, tangent = jax.jvp(lambda backward, x: backward(x), (backward, x), tangents[1:])
    # Not `forward(x)`: a second derivative must not look for that of `forward` either.
    return _bpda(forward, backward, x), tangent
