"""Randomized smoothing: the class that a network gives most often to a noisy row, and how far it holds in L2."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.attacks.parts.on_host import host_keys
from jaxnets.draws import drawn
from jaxnets.types import Array, LogitsFn

ABSTAIN = -1
"""The class of a row for which the draws do not suffice to say one."""


class Smoothed(NamedTuple):
    """What `certify` found.

    Attributes:
      classes: of the smoothed classifier, int ``[N]``; `ABSTAIN` where it could not be told.
      radii: within which, in L2 and the units of the data, the class does not change, float64 ``[N]``; 0 for `ABSTAIN`.
    """

    classes: np.ndarray
    radii: np.ndarray


def certify(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
) -> Smoothed:
    """The class of the smoothed classifier ``argmax_k P(f(x + e) = k)``, ``e ~ N(0, sigma^2)``, and a radius for it.

    The class is chosen by ``n0`` draws; ``n`` others count how often it comes, and give the lower end ``p`` of a
    one-sided Clopper-Pearson interval at level ``1 - alpha``. Then ``radius = sigma Phi^-1(p)`` where ``p > 1/2``, else
    the row is abstained from. For each row class and radius are wrong with probability ``alpha`` at most, over the
    draws. The noise is added in data space and not cut to the box: a network that normalises does so afterwards.

    The certificate is one of the smoothed classifier, not of ``logits_fn``: certified accuracy at a radius ``r`` is the
    share of rows with ``classes == y`` and ``radii >= r``.

    Args:
      key: one key, or one a row; a row's draws depend on its key alone.
      logits_fn: ``x[B, ...] -> logits[B, K]``, in inference mode.
      x: rows ``[N, ...]``, float.
      sigma: standard deviation of the noise, in the units of the data.
      n0: draws that choose the class.
      n: draws that count it.
      alpha: how often a row's certificate may be wrong.
      batch_size: draws at once.

    Raises:
      ValueError: without draws, for a ``sigma`` that is not above 0, an ``alpha`` not inside (0, 1), or rows that are
        not floats.

    Cohen et al. 2019, https://arxiv.org/abs/1902.02918, algorithm CERTIFY; Clopper and Pearson 1934.

    >>> lead = lambda x: jnp.concatenate([-x, x], axis=1)
    >>> print(certify(jax.random.key(0), lead, jnp.array([[2.0], [0.0]]), sigma=1.0, n=1000).classes)
    [ 1 -1]
    """
    _check(x, sigma, alpha, n0=n0, n=n, batch_size=batch_size)
    counts = partial(_counts, as_pytree(logits_fn), sigma=sigma, batch_size=batch_size)
    classes, hits = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64)
    for number, row in enumerate(_rows(key, x)):
        classes[number] = np.argmax(counts(*row, stage=0, draws=n0))
        hits[number] = np.asarray(counts(*row, stage=1, draws=n))[classes[number]]
    radii = radius(hits, n, sigma=sigma, alpha=alpha)
    return Smoothed(np.where(radii > 0, classes, ABSTAIN), radii)


def radius(hits: np.ndarray, n: int, *, sigma: float, alpha: float) -> np.ndarray:
    """The radius for a class that came ``hits[N]`` times in ``n`` draws, float64 ``[N]``: 0 where none is certified.

    ``sigma Phi^-1(p)`` with ``p`` the ``alpha`` quantile of ``Beta(hits, n - hits + 1)``, where it is above one half.

    >>> print(radius(np.array([500, 990]), 1000, sigma=0.5, alpha=0.001).round(3))
    [0.    0.989]
    """
    hits = np.asarray(hits)
    # By 1 - p, which keeps its digits where p is close to one.
    others = np.where(hits > 0, stats.beta.isf(alpha, n - hits + 1, np.maximum(hits, 1)), 1.0)
    return sigma * stats.norm.isf(np.minimum(others, 0.5))


def predict(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 1000,
) -> np.ndarray:
    """The class of the smoothed classifier, int ``[N]``: `ABSTAIN` where the two most frequent come about as often.

    They are told apart by a two-sided binomial test of equal chances at level ``alpha``: a class that is returned is
    not that of the smoothed classifier with probability ``alpha`` at most.

    Args:
      n: draws.
      key, logits_fn, x, sigma, alpha, batch_size: as for `certify`.

    Raises:
      ValueError: as `certify` does.

    Cohen et al. 2019, https://arxiv.org/abs/1902.02918, algorithm PREDICT; Hung and Fithian 2019.
    """
    _check(x, sigma, alpha, n=n, batch_size=batch_size)
    logits_fn, classes = as_pytree(logits_fn), np.full(len(x), ABSTAIN)
    for number, row in enumerate(_rows(key, x)):
        counts = np.asarray(_counts(logits_fn, *row, sigma=sigma, stage=0, draws=n, batch_size=batch_size))
        first, second = np.argsort(-counts, kind="stable")[:2]
        both = counts[first] + counts[second]
        if both and stats.binomtest(counts[first], both, 0.5).pvalue <= alpha:
            classes[number] = first
    return classes


def _check(x: Array, sigma: float, alpha: float, **draws: int) -> None:
    for name, count in draws.items():
        if count < 1:
            raise ValueError(f"smoothing takes at least one draw, got {name}={count}")
    if not (sigma > 0 and 0 < alpha < 1):
        raise ValueError(f"smoothing takes sigma above 0 and alpha inside (0, 1), got sigma={sigma}, alpha={alpha}")
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a float array of rows [N, ...], got {x.dtype}{list(x.shape)}")


def _rows(key: Array, x: Array) -> Iterator[tuple[Array, np.ndarray]]:
    """The rows with their keys, from the host: a program is compiled for one row, not for a number of them.

    In at least single precision: normal draws in less have no tails.
    """
    keys, x_host = host_keys(key, len(x)), np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    return ((keys[row].wrapped(), x_host[row]) for row in range(len(x_host)))  # pyright: ignore


@partial(jax.jit, static_argnames=("draws", "batch_size"))
def _counts(logits_fn, key, x, *, sigma, stage, draws, batch_size) -> Array:
    """How often each class comes in so many draws of one row: int32 ``[K]``. A draw's noise depends on its number."""
    key, size = jax.random.fold_in(key, stage), min(batch_size, draws)

    def noisy(number):
        return x + sigma * drawn(jax.random.normal, jax.random.fold_in(key, number), x.shape, x.dtype)

    def add(batch, counts):
        numbers = batch * size + jnp.arange(size)
        logits = logits_fn(jax.vmap(noisy)(numbers))
        counted = (numbers < draws) & ~jnp.isnan(logits).any(axis=1)
        return counts.at[jnp.argmax(logits, axis=1)].add(counted.astype(jnp.int32))

    classes = jax.eval_shape(logits_fn, x[None]).shape[1]
    return jax.lax.fori_loop(0, -(-draws // size), add, jnp.zeros(classes, jnp.int32))
