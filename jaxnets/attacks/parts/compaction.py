"""A loop over rows that ends for each of them at its own time, and does not pay for those that have ended."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxnets.types import Array

T = TypeVar("T")


def until_done(
    step: Callable[[Array, Any, T], T],
    done: Callable[[T], Array],
    end: Any,
    fixed: Any,
    carry: T,
    number: Any = 0,
    *,
    smallest: int = 64,
) -> T:
    """``carry = step(number, fixed, carry)`` for ``number = 0, ..., end - 1``, until all rows are done.

    Once half of the rows are done the others go on in an array of half the size, and so on: steps are paid for
    fewer than twice the rows that need them. Shapes stay static; the body is compiled once a size, which is why there
    is a smallest one.

    Args:
      step: works on any number of rows, and leaves those that are done as they are.
      done: which rows of a carry are done, bool ``[B]``; a row that is done stays so.
      end: number of steps at most; it may be traced.
      fixed: a pytree of arrays ``[B, ...]`` that do not change.
      carry: a pytree of arrays ``[B, ...]`` that do.
      number: of the first step.
      smallest: batches of no more rows are not halved; static.

    >>> fall = lambda number, by, height: jnp.maximum(height - by, 0)
    >>> heights = until_done(fall, lambda height: height == 0, 9, jnp.full(100, 2), jnp.arange(100))
    >>> print(heights[16:22], heights[-1])
    [0 0 0 1 2 3] 81
    """
    rows = len(jax.tree.leaves(carry)[0])
    half = rows // 2 if rows > smallest else 0

    def needed(state):
        return (state[0] < end) & (jnp.sum(~done(state[1])) > half)

    def advance(state):
        return state[0] + 1, step(state[0], fixed, state[1])

    number, carry = jax.lax.while_loop(needed, advance, (jnp.asarray(number), carry))
    if half == 0:
        return carry
    kept = jnp.argsort(done(carry), stable=True)[:half]
    fewer = until_done(step, done, end, _take(fixed, kept), _take(carry, kept), number, smallest=smallest)
    return jax.tree.map(lambda whole, part: whole.at[kept].set(part), carry, fewer)


def _take(tree: Any, rows: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], tree)
