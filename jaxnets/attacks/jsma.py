"""The saliency map attack: the two coordinates that help the wanted class most, again and again."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.attacks.parts.calling import as_pytree, check_rows, checked_logits, row_keys
from jaxnets.attacks.parts.classes import likeliest_others
from jaxnets.attacks.parts.minimum_norm import box_width
from jaxnets.attacks.parts.ranking import Nearest, nearer, nothing_found, within
from jaxnets.attacks.parts.stochastic import redrawn
from jaxnets.losses import is_targeted, margin, succeeded
from jaxnets.threats import L0, Threat, a_row, check_one_a_row, sizes
from jaxnets.types import Array, LogitsFn, Loss

_BLOCK = 8


def jsma(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    step_size: Any = None,
    targets: int = 1,
    loss: Loss = margin,
) -> Array:
    """Jacobian-based saliency map attack: moves, two at a time, the coordinates that raise the wanted class most.

    With ``a_i = d z_t / d x_i`` and ``b_i = -sum_{j != t} d z_j / d x_i`` the pair ``p != q`` of largest
    ``(a_p + a_q) (b_p + b_q)`` moves by ``step_size``, among pairs for which both sums are positive and coordinates
    that the box still lets move. A row ends at its first success, or where no such pair is left or another would change
    more coordinates than epsilon allows. A negative ``step_size`` lowers coordinates, and turns the signs of
    ``a`` and ``b``.

    The best pair is exact, without all pairs being looked at: one of the two is a coordinate that no other beats in
    both ``a`` and ``b``. A sort and a running maximum find these few, and they are paired with all, eight at a time.

    Args:
      key: one key, or one a row ``[B]``; used for `Stochastic` models alone.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: classes ``[B]``.
      threat: L0, whose epsilon is the most coordinates that may change; infinite for no limit.
      step_size: how far a coordinate moves at a time, scalar or ``[B]``, not 0; the width of the box unless given.
      targets: untargeted, how many of the most likely other classes are tried, side by side, at least 1; static.
      loss: only asked whether it is targeted, as ``losses.targeted(margin)`` is.

    Returns:
      ``x_adv[B, ...]`` of ``x``'s dtype: the success with the fewest changes, the clean row where there is none.

    Raises:
      ValueError: for shapes, dtypes or numbers that do not fit, or another threat.

    Papernot et al. 2016, https://arxiv.org/abs/1511.07528.

    >>> import jaxnets as jn
    >>> x, y = jnp.zeros((1, 3)), jnp.array([0])
    >>> logits_fn = lambda x: jnp.stack([1 - x[:, 0] - x[:, 1], x[:, 0] + 2 * x[:, 2]], axis=1)
    >>> print(jsma(jax.random.key(0), logits_fn, x, y, threat=jn.threats.L0(2)))
    [[1. 0. 1.]]
    """
    check_rows(x, target)
    if not isinstance(threat, L0):
        raise ValueError(f"jsma supports the threat L0, got {type(threat).__name__}")
    if targets < 1:
        raise ValueError(f"jsma takes at least one target, got targets={targets}")
    if x[0].size < 2:
        raise ValueError(f"jsma moves pairs of coordinates, got rows of shape {list(x.shape[1:])}")
    step_size = box_width("jsma", threat, "give a step_size") if step_size is None else step_size
    check_one_a_row(x, epsilon=threat.epsilon, step_size=step_size)
    if not isinstance(step_size, jax.Array) and not np.all(step_size):
        raise ValueError(f"jsma moves coordinates by step_size, which must not be 0, got {step_size}")
    step_size = a_row(step_size, x)
    return _jsma(key, as_pytree(logits_fn), x, target, threat, step_size, as_pytree(loss), targets=targets)


@partial(jax.jit, static_argnames="targets")
def _jsma(key, logits_fn, x, target, threat, step_size, loss, *, targets):
    keys = row_keys(key, len(x))
    logits = checked_logits(redrawn(logits_fn, keys, 0)(x), x)
    wanted = _wanted(logits, target, loss, targets)
    tries = wanted.shape[1]
    # Row by row all its targets side by side: [B * T].
    spread = lambda leaf: jnp.repeat(leaf, tries, axis=0)  # noqa: E731
    x_0, wanted, labels, keys = spread(x), wanted.ravel(), spread(target), spread(keys)
    epsilon = spread(jnp.broadcast_to(jnp.asarray(threat.epsilon, logits.dtype), len(x)))
    lengths = spread(step_size)

    def move(walk):
        logits, help_up, harm_up = _saliency(redrawn(logits_fn, keys, walk.number), walk.x, wanted)
        success = succeeded(loss, logits, labels) & ~jnp.any(jnp.isnan(logits), axis=1) & walk.active
        best = nearer(walk.best, walk.x, success, sizes(threat, walk.x, x_0))
        x_new, moved = jax.vmap(_move_pair, (None, 0, 0, 0, 0))(threat, lengths, walk.x, help_up, harm_up)
        size = sizes(threat, x_new, x_0)
        # A row's other targets are left where they can no longer do better.
        fewest = spread(jnp.min(best.size.reshape(-1, tries), axis=1))
        active = walk.active & ~success & moved & (size <= epsilon) & (size < fewest)
        x_t = jnp.where(active.reshape(-1, *[1] * (x.ndim - 1)), x_new, walk.x)
        return Walk(walk.number + 1, x_t, active, best)

    first = Walk(jnp.int32(1), x_0, jnp.ones(len(x_0), bool), nothing_found(x_0))
    best = jax.lax.while_loop(lambda walk: jnp.any(walk.active), move, first).best
    return within(_fewest(best, tries), threat, x)


class Walk(NamedTuple):
    """Where every row and target has come to, and which still go on."""

    number: Array
    x: Array
    active: Array
    best: Nearest


def _wanted(logits: Array, target: Array, loss: Loss, targets: int) -> Array:
    """The classes to aim at, ``[B, T]``."""
    classes = target if target.ndim == 1 else jnp.argmax(target, axis=1)
    if is_targeted(loss):
        return classes[:, None]
    return likeliest_others(logits, classes, targets)


def _fewest(best: Nearest, tries: int) -> Nearest:
    """The best target of each row."""
    x, size = best.x.reshape(-1, tries, *best.x.shape[1:]), best.size.reshape(-1, tries)
    rows, which = jnp.arange(len(x)), jnp.argmin(size, axis=1)
    return Nearest(x[rows, which], size[rows, which])


def _saliency(logits_fn: LogitsFn, x: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """Logits, gradients of the wanted one, and negative gradients of the sum of all others: two backward passes."""
    logits, pull_back = jax.vjp(lambda z: checked_logits(logits_fn(z), z), x)
    one_hot = jax.nn.one_hot(wanted, logits.shape[1], dtype=logits.dtype)
    gradients = jax.vmap(lambda seed: pull_back(seed)[0])(jnp.stack([one_hot, one_hot - 1]))
    return logits, gradients[0], gradients[1]


def _move_pair(threat: Threat, length: Array, x: Array, help_up: Array, harm_up: Array) -> tuple[Array, Array]:
    """One row with its best pair moved, and whether there was one."""
    a, b, flat = (jnp.sign(length) * help_up).ravel(), (jnp.sign(length) * harm_up).ravel(), x.ravel()
    free = jnp.where(length > 0, flat < threat.upper, flat > threat.lower) & jnp.isfinite(a) & jnp.isfinite(b)
    p, q, score = best_pair(a, b, free)
    moved = jnp.clip(flat.at[jnp.array([p, q])].add(length), threat.lower, threat.upper)
    return moved.reshape(x.shape), (score > 0) & jnp.any(moved != flat)


def best_pair(a: Array, b: Array, free: Array) -> tuple[Array, Array, Array]:
    """The places ``p != q`` of the largest ``(a_p + a_q) (b_p + b_q)``, both sums positive, and that product.

    Of ``a``, ``b`` and ``free``, all ``[n]``, only the free coordinates take part. The product is that of ``a`` and
    ``b`` each divided by their largest absolute value; minus infinity where there is no such pair.
    """
    a, b = _scaled(a, free), _scaled(b, free)
    order = jnp.lexsort((-b, -a))
    # Sorted by a, a coordinate is beaten where one before it has a b no smaller. Of the best pair at most one is
    # beaten, and by the other alone: a third one that beats it would take its place.
    before = jax.lax.cummax(jnp.concatenate([jnp.full(1, -jnp.inf, b.dtype), b[order][:-1]]))
    keep = b[order] > before
    # The few that are left come first, in blocks that meet all others.
    packed = order[jnp.argsort(~keep, stable=True)]
    count = jnp.sum(keep)
    return _search_pairs(a[packed], b[packed], count, packed)


def _scaled(values: Array, free: Array) -> Array:
    """Divided by the largest, so that no product overflows; minus infinity where not free."""
    largest = jnp.max(jnp.where(free, jnp.abs(values), 0))
    return jnp.where(free, values / jnp.where(largest > 0, largest, 1), -jnp.inf)


def _search_pairs(a: Array, b: Array, count: Array, places: Array) -> tuple[Array, Array, Array]:
    """All pairs of the first ``count`` coordinates, a block of rows at a time."""
    n = len(a)
    padded = [jnp.concatenate([leaf, jnp.full(_BLOCK, -jnp.inf, leaf.dtype)]) for leaf in (a, b)]

    def block(carry):
        first, *held = carry
        a_p, b_p = (jax.lax.dynamic_slice(leaf, (first,), (_BLOCK,))[:, None] for leaf in padded)
        good = (a_p + a > 0) & (b_p + b > 0) & (first + jnp.arange(_BLOCK)[:, None] != jnp.arange(n))
        product = jnp.where(good, (a_p + a) * (b_p + b), -jnp.inf).ravel()
        best = jnp.argmax(product)
        new = (places[first + best // n], places[best % n], product[best])
        return first + _BLOCK, *(jnp.where(new[2] > held[2], one, other) for one, other in zip(new, held, strict=True))

    nothing = (places[0], places[1], jnp.full((), -jnp.inf, a.dtype))
    start = (jnp.zeros_like(count), *nothing)
    _, p, q, score = jax.lax.while_loop(lambda carry: carry[0] < count, block, start)
    return p, q, score
