"""The boundary attack: from the label alone, walk along the boundary and towards the clean row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.decisions import Decisions, check_start, find_start, select, straight, to_boundary
from jaxnets.attacks.parts.minimum_norm import wide_a_row
from jaxnets.attacks.parts.queries import Queried, counts_queries
from jaxnets.attacks.parts.ranking import Nearest, within
from jaxnets.draws import drawn
from jaxnets.losses import margin
from jaxnets.threats import L2, Threat, check_one_a_row, sizes
from jaxnets.types import Array, LogitsFn, Loss


@counts_queries
def boundary(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    queries: Any = 25_000,
    loss: Loss = margin,
    start_points: Array | None = None,
    draws: Any = 100,
    stop_at: Any = 0.0,
    around: Any = 0.1,
    towards: Any = 0.05,
    probe_every: Any = 10,
    rate: Any = 0.1,
) -> Queried:
    """The boundary attack: the smallest perturbation found with ``queries`` predicted labels a row.

    At ``x_t``, of a label that is wanted and at the distance ``d_t`` from ``x``, a candidate goes along the sphere and
    then towards its middle, and is the next iterate where its label is wanted and it is nearer::

        s = x + (x_t - x + around_t d_t u) / sqrt(1 + around_t^2),   u normal to x_t - x, at random, |u|_2 = 1
        z = x + (1 - towards_t) d_t (s - x) / |s - x|_2

    both cut to the box. The two lengths adapt row by row, as the paper's do, so that of the points ``s``, probed once
    in ``probe_every`` candidates, and of the candidates ``z`` a fixed share has a label that is wanted; here by a
    factor after every answer, ``exp(rate (phi - share))`` with ``phi`` 1 or 0. The first point is brought to the
    boundary by halving. A row is done when its steps towards ``x`` are below 1e-7.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``; nothing but the argmax is used.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: what ``loss`` takes: classes ``[B]``, or floats ``[B, K]``.
      threat: `L2`; epsilon may be infinite.
      queries: that a row may ask, scalar or ``[B]``, all of which count: the first is for the clean row.
      loss: for its goal alone; `losses.targeted` of any for a targeted attack.
      start_points: ``[B, ...]``, of the labels wanted; a targeted attack hardly does without.
      draws: images uniform in the box that are tried where there is no starting point, or not of a label wanted.
      stop_at: a row whose perturbation is no larger than this asks no more, scalar or ``[B]``.
      around, towards: the first lengths of the two steps, in units of the distance.
      probe_every: candidates for each point ``s`` whose label is asked.
      rate: of the adaptation.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype: ``x`` itself where it has a label wanted already, and where nothing was found
      within epsilon. `with_queries` gives the counts too.

    Raises:
      ValueError: for shapes or dtypes that do not fit, another threat, or a box without an end and no start points.

    Brendel et al. 2018, https://arxiv.org/abs/1712.04248.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.7, 0.5]]), jnp.array([0])
    >>> x_adv = boundary(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(jnp.inf), queries=1000)
    >>> print(jnp.linalg.norm(x_adv - x).round(3))
    0.141
    """
    check_rows(x, target)
    if not isinstance(threat, L2):
        raise ValueError(f"boundary walks on spheres: it takes L2, got {threat}")
    check_start("boundary", threat, x, start_points)
    check_one_a_row(x, epsilon=threat.epsilon, queries=queries, stop_at=stop_at)
    settings = _Settings(draws, stop_at, around, towards, probe_every, rate)
    return _boundary(key, as_pytree(logits_fn), x, target, threat, queries, as_pytree(loss), start_points, settings)


class _Settings(NamedTuple):
    draws: Any
    stop_at: Any
    around: Any
    towards: Any
    probe_every: Any
    rate: Any


class _Walk(NamedTuple):
    number: Array
    x: Array
    size: Array
    around: Array
    towards: Array
    used: Array


# Of the probes the paper asks for about a half; of candidates it asks for less.
_PROBES, _CANDIDATES = 0.5, 0.2
_FIRST_SEARCH, _CONVERGED = 1e-3, 1e-7


@jax.jit
def _boundary(key, logits_fn, x, target, threat, queries, loss, start_points, settings):
    keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(row_keys(key, len(x)))
    budget = jnp.broadcast_to(jnp.asarray(queries, jnp.int32), len(x))
    decisions = Decisions(logits_fn, keys[2], target, loss, budget)
    started = find_start(decisions, keys[0], threat, x, start_points, settings.draws)
    walking = started.found & ~started.clean
    z, used = to_boundary(decisions, straight, x, started.x, started.used, walking, _FIRST_SEARCH)

    def alive(walk):
        return walking & (walk.size > settings.stop_at) & (walk.towards > _CONVERGED) & (walk.used < budget)

    def adapted(length, asked, reached, share):
        factor = jnp.exp(settings.rate * (reached - share)).astype(length.dtype)
        return jnp.where(asked, length * factor, length)

    def move(walk):
        going = alive(walk)
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys[1], walk.number)
        on_sphere, nearer = jax.vmap(_propose, in_axes=(0, None, 0, 0, 0, 0))(
            own, threat, x, walk.x, walk.around, walk.towards
        )
        reached, used = decisions.ask(nearer, walk.used, going)
        towards = adapted(walk.towards, going, reached, _CANDIDATES)

        def probe(used):
            asking = going & (used < budget)
            held, used = decisions.ask(on_sphere, used, asking)
            return adapted(walk.around, asking, held, _PROBES), used

        probing = (walk.number + 1) % settings.probe_every == 0
        around, used = jax.lax.cond(probing, probe, lambda used: (walk.around, used), used)
        size = sizes(threat, nearer, x)
        take = reached & (size < walk.size)
        z = select(take, nearer, walk.x)
        return _Walk(walk.number + 1, z, jnp.where(take, size, walk.size), around, towards, used)

    lengths = wide_a_row(settings.around, x), wide_a_row(settings.towards, x)
    walk = _Walk(jnp.zeros((), jnp.int32), z, sizes(threat, z, x), *lengths, used)
    walk = jax.lax.while_loop(lambda walk: jnp.any(alive(walk)), move, walk)
    found = Nearest(walk.x, jnp.where(walking, walk.size, jnp.inf))
    return Queried(within(found, threat, x), walk.used)


def _propose(key, threat, x, x_t, around, towards):
    """The point on the sphere and the candidate that lies nearer, of one example."""
    around, towards = around.astype(x.dtype), towards.astype(x.dtype)
    offset = x_t - x
    distance = threat.size(offset)
    out = offset / jnp.where(distance > 0, distance, 1)
    normal = drawn(jax.random.normal, key, x.shape, x.dtype)
    normal = normal - jnp.sum(normal * out) * out
    length = jnp.maximum(threat.size(normal), jnp.finfo(x.dtype).tiny)
    on_sphere = x + (offset + around * distance * normal / length) / jnp.sqrt(1 + around**2)
    on_sphere = jnp.clip(on_sphere, threat.lower, threat.upper)
    # Cutting to the box has brought it nearer already.
    left = threat.size(on_sphere - x)
    share = jnp.minimum((1 - towards) * distance / jnp.where(left > 0, left, 1), 1)
    return on_sphere, jnp.clip(x + share * (on_sphere - x), threat.lower, threat.upper)
