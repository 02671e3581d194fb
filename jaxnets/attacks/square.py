"""Square attack: random search with square windows, which asks for logits and for no gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.compaction import until_done
from jaxnets.attacks.parts.queries import Queried, counts_queries
from jaxnets.attacks.parts.ranking import Candidate, better, candidate, nothing_yet
from jaxnets.attacks.parts.stochastic import expected_logits, redrawn
from jaxnets.draws import drawn
from jaxnets.losses import margin, succeeded
from jaxnets.threats import L1, L2, Linf, Threat, a_row, check_one_a_row
from jaxnets.types import Array, LogitsFn, Loss

_HALVINGS = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
"""After which of 10,000 proposals the share of the image in a window is halved."""

_BLOCK = 64
"""For how many queries random numbers are drawn at once."""

_PYRAMID = {L2: (2, 2), L1: (1, 4)}
"""The power of the norm, and the power by which the layers of a pyramid fall."""


@counts_queries
def square(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    queries: int = 5000,
    horizon: int | None = None,
    p_init: Any = 0.8,
    loss: Loss = margin,
) -> Queried:
    """Square attack: ``x_{t+1} = z`` where ``loss(z) > loss(x_t)``, for ``z`` that differs from ``x_t`` in a square.

    The square covers a share of the image, ``p_init`` at first and halved nine times: after proposal 10, 50, 200, 500,
    1000, 2000, 4000, 6000, 8000 where ``horizon`` is 10,000, in proportion elsewhere. ``Linf``: each channel of the
    square moves to ``+epsilon`` or ``-epsilon``, from a start of vertical stripes. ``L2`` and ``L1``: the square gains
    two pyramids of opposite sign, and the size that a second square gives up.

    A row's first query is the clean row, the second its start. It stops at its first success, and returns that, or else
    the point of highest loss since the start. Rows that have stopped leave the batch, half of it at a time. A
    `Stochastic` model answers a query with the mean over its draws.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``, for any ``B``.
      x: clean images ``[B, H, W, C]`` or ``[B, H, W]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: `Linf`, `L2` or `L1`.
      queries: the most that a row may cost, at least 1; another budget is no new trace.
      horizon: the budget that the squares shrink for; ``queries`` unless given. AutoAttack's is 10,000.
      p_init: share of the image in the first squares, in (0, 1].
      loss: raised by the attack; `losses.targeted` for a targeted one.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype; by `with_queries` also the queries ``[B]``.

    Raises:
      ValueError: for rows that are no images, another threat, no queries, or shapes and dtypes that do not fit.

    Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049; for L1 Croce and Hein 2021,
    https://arxiv.org/abs/2103.01208.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 1, 2), 0.5), jnp.array([0])
    >>> logits_fn = lambda x: x[:, 0] + jnp.array([0.1, 0.0])
    >>> print(square(jax.random.key(0), logits_fn, x, y, threat=jn.Linf(0.1), queries=20))
    [[[0.4 0.6]]]
    """
    check_rows(x, target)
    check_one_a_row(x, epsilon=threat.epsilon)
    if isinstance(queries, int) and queries < 1:
        raise ValueError(f"square takes at least one query a row, got queries={queries}")
    if type(threat) not in _SEARCHES:
        raise ValueError(f"square knows the threats Linf, L2 and L1, got {threat}")
    if x.ndim not in (3, 4):
        raise ValueError(
            f"square moves windows of images: x must be [B, H, W, C] or [B, H, W], got shape {list(x.shape)}; "
            f"give flat rows the shape of images, and flatten them again in logits_fn"
        )
    horizon = queries if horizon is None else horizon
    return _square(key, as_pytree(logits_fn), x, target, threat, queries, horizon, p_init, as_pytree(loss))


class _Rows(NamedTuple):
    """What does not change: keys of the model's draws ``[B]``, the images ``[B, H, W, C]``, and the arguments."""

    keys: Array
    x: Array
    target: Array
    threat: Threat


@jax.jit
def _square(key, logits_fn, x, target, threat, queries, horizon, p_init, loss) -> Queried:
    shape, keys = x.shape, jax.vmap(lambda key: jax.random.split(key, 3))(row_keys(key, len(x)))
    epsilon = a_row(threat.epsilon, x)
    rows = _Rows(keys[:, 0], x.reshape(*shape[:3], -1), target, replace(threat, epsilon=epsilon))
    search = _SEARCHES[type(threat)]

    def ask(number, rows, carry, z):
        best, cost = carry
        logits = expected_logits(redrawn(logits_fn, rows.keys, number), z.reshape(-1, *shape[1:]))
        # The clean row is held only where it succeeds: the search begins at its start, be that better or worse.
        among = ~best.success & ((number > 0) | succeeded(loss, logits, rows.target))
        return better(best, candidate(loss, z, logits, rows.target), among), cost + ~best.success

    def begin(number, fixed, carry):
        rows, start = fixed
        return ask(number, rows, carry, jnp.where(number == 0, rows.x, start))

    def go_on(number, fixed, carry):
        rows, draws = fixed
        side = _side(number - 2, horizon, p_init, shape[1:3])
        z = jax.vmap(search.move, (0, 0, None, 0, 0))(rows.threat, draws[:, number % _BLOCK], side, rows.x, carry[0].x)
        return ask(number, rows, carry, z)

    def block(state):
        # Random numbers for many proposals: drawn in the loop over them, they would cost more than the moves.
        number, carry = state
        draws = jax.vmap(lambda key: _draws(jax.random.fold_in(key, number // _BLOCK), rows.x.shape[3]))(keys[:, 2])
        end = jnp.minimum((number // _BLOCK + 1) * _BLOCK, queries)
        return end, until_done(go_on, _done, end, (rows, draws), carry, number)

    start = jax.vmap(search.start)(rows.threat, keys[:, 1], rows.x)
    carry = nothing_yet(rows.x), jnp.zeros(len(x), jnp.int32)
    carry = until_done(begin, _done, jnp.minimum(queries, 2), (rows, start), carry, smallest=len(x))
    more = lambda state: (state[0] < queries) & ~jnp.all(_done(state[1]))  # noqa: E731
    _, (best, cost) = jax.lax.while_loop(more, block, (jnp.asarray(2), carry))
    return Queried(best.x.reshape(shape), cost)


def _done(carry: tuple[Candidate, Array]) -> Array:
    return carry[0].success


def _side(proposal: Array, horizon: Any, p_init: Any, size: tuple[int, ...]) -> Array:
    """Side of the square: ``sqrt(p H W)``, rounded, at least 1 and inside the image."""
    elapsed = jnp.floor(proposal * (10000 / horizon))
    p = p_init / 2.0 ** jnp.sum(elapsed > _HALVINGS)
    return jnp.clip(jnp.round(jnp.sqrt(p * size[0] * size[1])), 1, min(size)).astype(jnp.int32)


def _draws(key: Array, channels: int) -> Array:
    """What the moves of a block draw: two corners, whether a pattern is turned, a sign for each channel."""
    return drawn(jax.random.uniform, key, (_BLOCK, 5 + channels))


def _corner(draws: Array, side: Array, x: Array) -> Array:
    """Row and column of a window's corner, uniform over those where it lies in the image."""
    free = jnp.array(x.shape[:2]) - side
    return jnp.minimum((draws * (free + 1)).astype(jnp.int32), free)


def _signs(draws: Array) -> Array:
    return jnp.where(draws < 0.5, -1, 1)


def _offsets(corner: Array, x: Array) -> tuple[Array, Array]:
    """Row ``[H, 1]`` and column ``[1, W]`` of the pixels, counted from a window's corner."""
    return jnp.arange(x.shape[0])[:, None] - corner[0], jnp.arange(x.shape[1])[None] - corner[1]


def _window(corner: Array, side: Array, x: Array) -> Array:
    """Which pixels ``[H, W, 1]`` lie in a window."""
    down, right = _offsets(corner, x)
    return ((down >= 0) & (down < side) & (right >= 0) & (right < side))[..., None]


# Linf: Algorithm 2 of the paper.


def _ends(threat: Threat, x: Array) -> tuple[Array, Array]:
    """How far every coordinate can go, down and up."""
    return jnp.maximum(x - threat.epsilon, threat.lower), jnp.minimum(x + threat.epsilon, threat.upper)


def _stripes(threat: Threat, key: Array, x: Array) -> Array:
    low, high = _ends(threat, x)
    return jnp.where(drawn(jax.random.uniform, key, (1, *x.shape[1:])) < 0.5, high, low)


def _recolour(threat: Threat, draws: Array, side: Array, x: Array, x_t: Array) -> Array:
    low, high = _ends(threat, x)
    window, up = _window(_corner(draws[:2], side, x), side, x), _signs(draws[5:]) > 0
    # A window that has these colours already would waste the query: it takes the opposite ones.
    same = jnp.all(~window | (x_t == jnp.where(up, high, low)))
    return jnp.where(window, jnp.where(up ^ same, high, low), x_t)


# L2: Algorithm 3 of the paper. L1: the same with sizes that add up without squares, as in the authors' AutoAttack.


def _tiles(threat: Threat, key: Array, x: Array) -> Array:
    """Pyramids all over the image, five pairs along its shorter side, each pair turned and signed at random."""
    power, decay = _PYRAMID[type(threat)]
    side = max(min(x.shape[:2]) // 5, 1)
    counts = np.array(x.shape[:2]) // side
    margins = [(left // 2, left - left // 2) for left in np.array(x.shape[:2]) - side * counts] + [(0, 0)]

    def one_a_tile(values):
        return values.repeat(side, 0).repeat(side, 1)

    upright = _pyramids(side, side, power, decay).astype(x.dtype)
    draws = one_a_tile(drawn(jax.random.uniform, key, (*counts, 1 + x.shape[2])))
    turned, upright = jnp.tile(upright.T, counts)[..., None], jnp.tile(upright, counts)[..., None]
    delta = jnp.where(draws[..., :1] < 0.5, turned, upright) * _signs(draws[..., 1:]).astype(x.dtype)
    delta = jnp.pad(delta, margins)
    return threat.project(x + delta * jnp.maximum(threat.epsilon / threat.size(delta), 1), x)


def _shift(threat: Threat, draws: Array, side: Array, x: Array, x_t: Array) -> Array:
    """One window gains a pair of pyramids and takes up the size that is unused and that of a second window."""
    power, decay = _PYRAMID[type(threat)]
    # Odd, and at least 3, where the image is.
    side = jnp.minimum(jnp.maximum(side, 3) // 2 * 2 + 1, min(x.shape[:2]))
    corner, delta, unused = _corner(draws[:2], side, x), *_with_unused(threat, x_t - x, power)
    gains, gives = _window(corner, side, x), _window(_corner(draws[2:4], side, x), side, x)
    pyramids = _placed(_pyramids(side, min(x.shape[:2]), power, decay), corner, draws[4] < 0.5, gains)
    new = _unit(_signs(draws[5:]) * pyramids + _unit(jnp.where(gains, delta, 0), power), power).astype(x.dtype)
    # What each channel may have in the windows: what it has, and its share of what is unused.
    weights = jnp.where(gains | gives, jnp.abs(delta) ** power, 0)
    room = (jnp.sum(weights, (0, 1)) + unused / x.shape[2]) ** (1 / power)
    if power == 1 and x.shape[2] > 1:
        # More than fits, as in the authors' code: the box takes part of it, the projection the rest.
        moved = jnp.where(gains, new * room * x.shape[2], jnp.where(gives, 0, delta))
        return threat.project(x + moved, x)
    moved = jnp.where(gains, new * room, jnp.where(gives, 0, delta))
    return jnp.clip(x + moved, threat.lower, threat.upper)


def _with_unused(threat: Threat, delta: Array, power: int) -> tuple[Array, Array]:
    """The perturbation, and ``epsilon^p - |delta|_p^p``.

    Moves keep the size, but for rounding: aiming a little below epsilon keeps them inside, without measuring again.
    """
    used, whole = jnp.sum(jnp.abs(delta) ** power), ((1 - 5e-7) * threat.epsilon) ** power
    shrink = jnp.minimum(whole / jnp.where(used > 0, used, 1), 1) ** (1 / power)
    return delta * jnp.where(used > 0, shrink, 1), jnp.maximum(whole - used, 0)


def _pyramids(side: Any, extent: int, power: int, decay: int) -> Array:
    """A pyramid above another of opposite sign, in the corner of ``[extent, extent]``; the size of both is 1.

    Layers are squares around the middle of each half: the height at distance ``d`` is ``sum_{j=d+1}^{n} 1 / j^decay``.
    """
    down, right, half = jnp.arange(extent)[:, None], jnp.arange(extent)[None], side // 2
    below = down >= half
    middle = jnp.where(below, half + (side - half) // 2, half // 2)
    distance = jnp.maximum(jnp.abs(down - middle), jnp.abs(right - half))
    layers = jnp.asarray(np.concatenate([[0], np.cumsum(np.arange(1.0, extent + 2) ** -decay)]), jnp.float32)
    height = jnp.where((down < side) & (right < side), layers[half + 1] - layers[distance], 0)
    lower, upper = _unit(jnp.where(below, height, 0), power), _unit(jnp.where(below, 0, height), power)
    return _unit(upper - lower, power)


def _placed(pattern: Array, corner: Array, turned: Array, window: Array) -> Array:
    """A pattern in a window of an image ``[H, W, 1]``, zero elsewhere, transposed where it is to be turned."""
    down, right = _offsets(corner, window)
    place = jnp.where(turned, right * len(pattern) + down, down * len(pattern) + right)[..., None]
    values = pattern.ravel().at[jnp.where(window, place, 0)].get(mode="promise_in_bounds")
    return jnp.where(window, values, 0)


def _unit(pattern: Array, power: int) -> Array:
    """Each channel divided by its size; zero stays zero."""
    size = jnp.sum(jnp.abs(pattern) ** power, (0, 1)) ** (1 / power)
    return pattern / jnp.where(size > 0, size, 1)


class _Search(NamedTuple):
    """How a norm is searched: ``start(threat, key, x)`` and ``move(threat, draws, side, x, x_t)`` of one image."""

    start: Callable[..., Array]
    move: Callable[..., Array]


_SEARCHES = {Linf: _Search(_stripes, _recolour), L2: _Search(_tiles, _shift), L1: _Search(_tiles, _shift)}
