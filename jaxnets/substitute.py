"""A black box with nothing but labels: train a substitute for it on points of one's own making, and attack that."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from jaxnets import parallel
from jaxnets.attacks.gradient import fgsm
from jaxnets.attacks.parts.on_host import attack_rows, checked_data, host_keys
from jaxnets.classifier import Classifier
from jaxnets.data import batch_indices, padded_batches, steps_per_epoch
from jaxnets.losses import cross_entropy, targeted
from jaxnets.objectives import standard
from jaxnets.threats import Linf
from jaxnets.training import TrainState, init_state, make_step
from jaxnets.types import Array, Batch, LogitsFn, Params, Stats

Oracle = Callable[[np.ndarray], Any]
"""``x[B, ...] -> int[B]``: the black box, of which an attacker sees labels alone."""


class Substitute(NamedTuple):
    """A trained substitute.

    Attributes:
      params, stats: of the network.
      x: the points ``[N, ...]`` that it was trained on, the first ones given and the others made from them.
      labels: what the oracle called them, ``[N]``.
      queries: labels that the oracle was asked for.
    """

    params: Params
    stats: Stats
    x: np.ndarray
    labels: np.ndarray
    queries: int


def substitute(
    key: Array,
    oracle: Oracle,
    x: np.ndarray,
    net: Classifier,
    optimizer: optax.GradientTransformation,
    *,
    rounds: int = 6,
    epochs: int = 10,
    batch_size: int = 32,
    step_size: Any = 0.1,
    at_most: int | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Substitute:
    """Trains a substitute for ``oracle`` by Jacobian-based augmentation of the data.

    In every round the substitute ``p`` goes on training on the points so far, and all but the last round then add one
    point for each, for which the oracle is asked::

        S_{r+1} = S_r union { clip(x + step_size sign(grad_x p(x)[O(x)])) : x in S_r }

    So the number of points doubles, but for those that are there already: where the signs have not changed a point
    makes the same one again. The oracle labels each once, at most ``len(x) 2^(rounds - 1)`` in all. The substitute is
    an ordinary model: ``net.logits_fn(result.params, result.stats)`` goes to any attack, whose examples go to the
    oracle.

    Args:
      key: of initialisation, order of the rows, and choices.
      oracle: asked for rows ``[B, ...]``; no more is known of it.
      x: the attacker's first points ``[N, ...]``, float, inside the box: some of every class.
      net: the substitute, of as many classes as the oracle has; it need not resemble the oracle.
      optimizer: that trains it.
      rounds: of training, at least 1.
      epochs: passes over the points in each round.
      batch_size: rows a step, at most ``len(x)``.
      step_size: lambda, in the units of the data.
      at_most: points added in a round; where there are more, so many points are drawn to make them from.
      lower, upper: the box.

    Raises:
      ValueError: for settings that do not fit, rows outside the box, or an oracle that returns anything but one class
        a row.

    Papernot et al. 2017, https://arxiv.org/abs/1602.02697; drawing the points: https://arxiv.org/abs/1605.07277.
    """
    if rounds < 1 or epochs < 1 or not 1 <= batch_size <= len(x) or (at_most is not None and at_most < 1):
        raise ValueError(
            "substitute needs rounds, epochs and at_most of at least 1 and batch_size in 1.."
            f"{len(x)}, the rows given: got {rounds}, {epochs}, {at_most} and {batch_size}"
        )
    init_key, train_key, draw_key = jax.random.split(key, 3)
    x = checked_data("substitute", x, Linf(step_size, lower, upper))
    labels = _asked(oracle, x)
    state = init_state(train_key, *net.init(init_key, jnp.asarray(x[:batch_size])), optimizer)
    step = jax.jit(make_step(standard(net), optimizer), donate_argnums=0)
    add = partial(_augmented, threat=Linf(step_size, lower, upper), rows_at_once=batch_size)
    for number in range(rounds):
        order_key = jax.random.fold_in(draw_key, number)
        state = _trained(order_key, step, state, x, labels, epochs, batch_size)
        if number < rounds - 1:
            rows = _drawn(order_key, len(x), at_most)
            new = _unseen(add(net.logits_fn(state.params, state.stats), x[rows], labels[rows]), x)
            x, labels = np.concatenate([x, new]), np.concatenate([labels, _asked(oracle, new)])
    return Substitute(state.params, state.stats, x, labels, len(labels))


def agreement(logits_fn: LogitsFn, oracle: Oracle, x: np.ndarray) -> float:
    """The fraction of rows that the substitute and the oracle give the same label."""
    x = np.asarray(x)
    keys, labels = host_keys(jax.random.key(0), len(x)), _asked(oracle, x)
    alike = attack_rows(None, keys, logits_fn, x, labels, batch_size=None, mesh=parallel.data_mesh())
    return float(alike.correct.mean())


def _asked(oracle: Oracle, x: np.ndarray) -> np.ndarray:
    if not len(x):
        return np.zeros(0, np.int32)
    labels = np.asarray(oracle(x))
    if labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"an oracle returns one integer class for each of {len(x)} rows, got {labels.dtype}{list(labels.shape)}: "
            "pass the argmax of its logits"
        )
    return labels.astype(np.int32)


def _trained(key, step, state: TrainState, x, labels, epochs: int, batch_size: int) -> TrainState:
    for number in range(epochs * steps_per_epoch(len(x), batch_size)):
        rows = batch_indices(key, number, len(x), batch_size)
        state, _ = step(state, Batch(jnp.asarray(x[rows]), jnp.asarray(labels[rows])))
    return state


def _drawn(key: Array, rows: int, at_most: int | None) -> np.ndarray:
    if at_most is None or at_most >= rows:
        return np.arange(rows)
    return np.sort(np.asarray(jax.random.choice(key, rows, (at_most,), replace=False)))


def _unseen(new: np.ndarray, x: np.ndarray) -> np.ndarray:
    seen, rows = {row.tobytes() for row in x}, []
    for row in new:
        if row.tobytes() not in seen:
            seen.add(row.tobytes())
            rows.append(row)
    return np.stack(rows) if rows else new[:0]


def _augmented(logits_fn: Partial, x, labels, *, threat: Linf, rows_at_once: int) -> np.ndarray:
    """One point for each: a fast gradient step towards its own label, as log p rises where p does."""
    found = np.empty_like(x)
    for rows, valid in padded_batches(len(x), rows_at_once):
        classes = jnp.asarray(labels[rows])
        # Nothing is drawn in a step from the clean point.
        key = jax.random.key(0)
        new = fgsm(key, logits_fn, jnp.asarray(x[rows]), classes, threat=threat, loss=targeted(cross_entropy))
        found[rows[:valid]] = np.asarray(new)[:valid]
    return found
