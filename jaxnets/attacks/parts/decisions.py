"""What a decision-based attack has: the predicted label alone, so many times, and a first point on the other side.

Rows go through the same loops but each counts its own queries and stops at its own budget: what a row asks, and what it
draws, depends on its own key and count alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import checked_logits
from jaxnets.attacks.parts.minimum_norm import box_width
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.draws import drawn
from jaxnets.losses import succeeded
from jaxnets.threats import Threat
from jaxnets.types import Array

Blend = Callable[[Array, Array, Array], Array]
"""``(x, x_adv, s) -> point`` of one example, on a way from ``x`` at ``s = 0`` to ``x_adv`` at ``s = 1``."""


class Decisions(NamedTuple):
    """The model as a decision-based attack sees it: whether the label of a point is one that the attacker wants.

    Attributes:
      model: ``x[B, ...] -> logits[B, K]``, of which the argmax is used.
      keys: one a row, for models that draw.
      target: as ``loss`` takes it.
      loss: whose goal counts, and not its value.
      budget: queries that each row may ask, ``[B]``.
    """

    model: Any
    keys: Array
    target: Array
    loss: Any
    budget: Array

    def ask(self, z: Array, used: Array, among: Array) -> tuple[Array, Array]:
        """One query a row: bool ``[B]`` and the queries used, for rows ``among[B]`` within their budget; else false."""
        asking = among & (used < self.budget)
        return self._reached(z, used, self.target) & asking, used + asking

    def ask_many(self, z: Array, used: Array, among: Array) -> tuple[Array, Array]:
        """As `ask` for ``z[B, M, ...]`` and ``among[B, M]``: bool ``[B, M]``."""
        rows, many = z.shape[:2]
        numbers = used[:, None] + jnp.cumsum(among, axis=1, dtype=used.dtype) - among
        asking = among & (numbers < self.budget[:, None])
        right = self._reached(z.reshape(-1, *z.shape[2:]), numbers.ravel(), jnp.repeat(self.target, many, axis=0))
        return right.reshape(rows, many) & asking, used + jnp.sum(asking, axis=1, dtype=used.dtype)

    def _reached(self, z: Array, numbers: Array, target: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in)(jnp.repeat(self.keys, len(z) // len(self.keys)), numbers)
        logits = checked_logits(redrawn(self.model, keys, 0)(z), z)
        return succeeded(self.loss, logits, target)


def check_start(name: str, threat: Threat, x: Array, start: Array | None) -> None:
    """Raises ValueError where starting points do not fit the rows, or there are none and no box to draw them in."""
    if start is None:
        box_width(name, threat, "give start_points")
    elif jnp.shape(start) != x.shape:
        raise ValueError(f"start_points must have the shape of x, {list(x.shape)}, got {list(jnp.shape(start))}")


class Started(NamedTuple):
    """``x[B, ...]`` of the label wanted where ``found[B]``, else clean; ``clean[B]`` rows are so already."""

    x: Array
    found: Array
    clean: Array
    used: Array


def find_start(decisions: Decisions, keys: Array, threat: Threat, x: Array, start: Array | None, draws: Any) -> Started:
    """Asks for the clean rows, then for ``start`` where there is one, then for images uniform in the box.

    At most ``draws`` images are drawn; a row that has found one asks no more.
    """
    clean, used = decisions.ask(x, jnp.zeros(len(x), jnp.int32), jnp.ones(len(x), bool))
    held = Started(x, clean, clean, used)
    if start is not None:
        held = _try(decisions, held, jnp.clip(start, threat.lower, threat.upper).astype(x.dtype))

    def searching(carry):
        number, held = carry
        return (number < draws) & jnp.any(~held.found & (held.used < decisions.budget))

    def draw(carry):
        number, held = carry
        z = jax.vmap(
            lambda key, row: drawn(
                jax.random.uniform, jax.random.fold_in(key, number), row.shape, row.dtype, threat.lower, threat.upper
            )
        )(keys, x)
        return number + 1, _try(decisions, held, z)

    return jax.lax.while_loop(searching, draw, (0, held))[1]


def _try(decisions: Decisions, held: Started, z: Array) -> Started:
    right, used = decisions.ask(z, held.used, ~held.found)
    return Started(select(right, z, held.x), held.found | right, held.clean, used)


def to_boundary(
    decisions: Decisions, blend: Blend, x: Array, x_adv: Array, used: Array, among: Array, tolerance: Any
) -> tuple[Array, Array]:
    """Halves the way from ``x`` to ``x_adv`` until the label is known to change within ``tolerance`` of it.

    Returns the nearest point found of the label wanted, ``[B, ...]``, and the queries used. Other rows stay.
    """

    def open_rows(low, high, used):
        return among & (high - low > tolerance) & (used < decisions.budget)

    def halve(carry):
        low, high, point, used = carry
        middle = (low + high) / 2
        z = jax.vmap(blend)(x, x_adv, middle)
        asking = open_rows(low, high, used)
        right, used = decisions.ask(z, used, asking)
        point = select(right, z, point)
        return jnp.where(asking & ~right, middle, low), jnp.where(right, middle, high), point, used

    low = jnp.zeros(len(x), x.dtype)
    carry = low, jnp.ones_like(low), x_adv, used
    return jax.lax.while_loop(lambda c: jnp.any(open_rows(c[0], c[1], c[3])), halve, carry)[2:]


def straight(x: Array, x_adv: Array, s: Array) -> Array:
    """``x + s (x_adv - x)``, which lies between the two, rounding or not."""
    return jnp.clip(x + s * (x_adv - x), jnp.minimum(x, x_adv), jnp.maximum(x, x_adv))


def select(rows: Array, z: Array, otherwise: Array) -> Array:
    """Row by row ``z[B, ...]`` where ``rows[B]``, else the other."""
    return jnp.where(rows.reshape(-1, *[1] * (z.ndim - 1)), z, otherwise)
