"""Losses of one example or many: never reduced over the batch, and higher is worse for the model.

Every loss is ``(logits[..., K], target) -> [...]``. Integer targets ``[...]`` name a class; `cross_entropy` also takes
a distribution ``[..., K]`` (mixed or smoothed labels) and `kl` takes the logits of another prediction. Of a class that
is not among the K the loss is NaN.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxnets.types import Array, Loss


def cross_entropy(logits: Array, target: Array) -> Array:
    """Negative log-likelihood: ``-log softmax(z)_y``, or ``-sum_k p_k log softmax(z)_k``.

    Args:
      logits: ``[..., K]``.
      target: integer classes ``[...]`` or probabilities ``[..., K]``.

    >>> print(cross_entropy(jnp.array([0.0, 0.0]), jnp.array(1)))
    0.6931472
    """
    log_p = jax.nn.log_softmax(logits)
    if _is_classes(logits, target):
        return -_pick(log_p, target)
    # A class of no probability adds nothing where its logit is -inf as well.
    return -jnp.sum(target * jnp.where((target == 0) & jnp.isneginf(log_p), 0, log_p), axis=-1)


def margin(logits: Array, target: Array) -> Array:
    """How far the best wrong class leads: ``max_{k != y} z_k - z_y``.

    Negative where the row is classified as its target, positive where it is not; at zero, a tie, the class that comes
    first is the prediction.

    Args:
      logits: ``[..., K]``, ``K >= 2``.
      target: integer classes ``[...]``.

    Raises:
      ValueError: for fewer than 2 classes.

    Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644 (their f6 without the floor).

    >>> print(margin(jnp.array([-3.0, -1.0, -2.0]), jnp.array(1)))
    -1.0
    """
    _check_classes(logits, target, at_least=2, name="margin")
    return _best_other(logits, target) - _pick(logits, target)


def dlr(logits: Array, target: Array) -> Array:
    """Difference of logits ratio: ``(max_{k != y} z_k - z_y) / (z_(1) - z_(3))``, sorted in falling order.

    It does not change when the logits are scaled or shifted, so it does not saturate as cross-entropy does.
    Where the three largest logits are equal the ratio is undefined and the difference itself is returned.

    Args:
      logits: ``[..., K]``, ``K >= 3``.
      target: integer classes ``[...]``.

    Raises:
      ValueError: for fewer than 3 classes.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690, equation 6.

    >>> print(dlr(jnp.array([4.0, 3.0, 2.0]), jnp.array(0)))
    -0.5
    """
    _check_classes(logits, target, at_least=3, name="dlr")
    first, _, third = _falling(logits, 3)
    gap = first - third
    return margin(logits, target) / jnp.where(gap > 0, gap, 1)


def dlr_targeted(logits: Array, target: Array, wanted: Array) -> Array:
    """`dlr` towards one class: ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``, sorted in falling order.

    A loss of three arguments: how far the class that the attacker wants leads over the true one. Bound to ``wanted``,
    as ``Partial(dlr_targeted, wanted=wanted)``, it is a loss whose attack succeeds where the prediction is not
    ``target``. Where the four largest logits are equal the difference itself is returned.

    Args:
      logits: ``[..., K]``, ``K >= 4``.
      target: the true classes ``[...]``, integers.
      wanted: other classes ``[...]``, integers.

    Raises:
      ValueError: for fewer than 4 classes.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690, equation 7.

    >>> print(dlr_targeted(jnp.array([4.0, 3.0, 2.0, 2.0]), jnp.array(0), jnp.array(1)))
    -0.5
    """
    _check_classes(logits, target, at_least=4, name="dlr_targeted")
    _check_classes(logits, wanted, at_least=4, name="dlr_targeted")
    first, _, third, fourth = _falling(logits, 4)
    gap = first - (third + fourth) / 2
    return (_pick(logits, wanted) - _pick(logits, target)) / jnp.where(gap > 0, gap, 1)


def kl(logits: Array, target: Array) -> Array:
    """Kullback-Leibler divergence from a reference prediction: ``sum_k p_k (log p_k - log q_k)``.

    Here ``p = softmax(target)`` and ``q = softmax(logits)``; gradients flow through both. At ``logits == target`` the
    gradient is zero but for rounding: an attack on this loss must start elsewhere.

    Args:
      logits: ``[..., K]``.
      target: logits of the reference prediction, ``[..., K]``.

    Raises:
      ValueError: where the shapes differ.

    Zhang et al. 2019, https://arxiv.org/abs/1901.08573.

    >>> print(kl(jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])))
    0.0
    """
    if logits.shape != target.shape:
        raise ValueError(f"kl compares two arrays of logits: got shapes {logits.shape} and {target.shape}")
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    # A class of no probability adds nothing where its logits are -inf as well.
    return jnp.sum(p * jnp.where(p == 0, 0, log_p - log_q), axis=-1)


@dataclass(frozen=True)
class Targeted:
    """The negative of a loss: raising it pulls the prediction towards ``target``. Made by `targeted`."""

    loss: Loss

    def __call__(self, logits: Array, target: Array) -> Array:
        return -self.loss(logits, target)


def targeted(loss: Loss) -> Loss:
    """The loss of a targeted attack: ``-loss``, with ``target`` the class that the attacker wants.

    Equal losses give equal results, so a jitted attack is not traced again.

    >>> print(targeted(margin)(jnp.array([0.0, 2.0]), jnp.array(1)))
    2.0
    """
    return Targeted(loss)


def boosted_cross_entropy(logits: Array, target: Array) -> Array:
    """Cross-entropy with a margin: ``-log p_y - log(1.0001 - max_{k != y} p_k + 1e-12)`` for ``p = softmax(z)``.

    The BCE of MART; the constants, which keep the second logarithm finite, are those of its authors' code.

    Args:
      logits: ``[..., K]``, ``K >= 2``.
      target: integer classes ``[...]``.

    Raises:
      ValueError: for fewer than 2 classes.

    Wang et al. 2020, https://openreview.net/forum?id=rklOg6EFwS, equation 7.

    >>> f"{boosted_cross_entropy(jnp.array([0.0, 0.0]), jnp.array(1)):.4f}"  # log 2 - log 0.5001
    '1.3861'
    """
    _check_classes(logits, target, at_least=2, name="boosted_cross_entropy")
    other = _best_other(jax.nn.softmax(logits), target)
    return cross_entropy(logits, target) - jnp.log(1.0001 - other + 1e-12)


@dataclass(frozen=True)
class Smoothed:
    """Cross-entropy against smoothed labels. Made by `smoothed`."""

    amount: float

    def __call__(self, logits: Array, target: Array) -> Array:
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        return (1 - self.amount) * cross_entropy(logits, target) + self.amount * uniform


def smoothed(amount: float) -> Loss:
    """`cross_entropy` against ``(1 - amount) p + amount / K``, ``p`` the label or a distribution: label smoothing.

    Equal amounts give equal losses, so a jitted attack is not traced again; within attacks the amount cannot be traced.

    Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.

    >>> z, y = jnp.array([0.0, 2.0]), jnp.array(1)
    >>> f"{cross_entropy(z, y):.3f}, smoothed {smoothed(0.1)(z, y):.3f}"
    '0.127, smoothed 0.227'
    """
    return Smoothed(amount)


def is_right(logits: Array, target: Array) -> Array:
    """Whether the prediction is ``target``: classes ``[...]``, or what has its largest entry there. Bool ``[...]``.

    Never where a logit is NaN: its place is no prediction.

    >>> print(is_right(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), jnp.array([1, 0])))
    [ True False]
    """
    classes = target if target.ndim < logits.ndim else jnp.argmax(target, axis=-1)
    return (jnp.argmax(logits, axis=-1) == classes) & ~jnp.isnan(logits).any(axis=-1)


def succeeded(loss: Loss, logits: Array, target: Array) -> Array:
    """Whether an attack on ``loss`` has reached its goal: bool ``[...]``.

    Untargeted: the prediction is not ``target``; targeted: it is. Distributions and logits as ``target`` stand for
    their largest class. Never where a logit is NaN: its place is no prediction.
    """
    classes = target if _is_classes(logits, target) else jnp.argmax(target, axis=-1)
    reached = jnp.argmax(logits, axis=-1) == classes
    return (reached if is_targeted(loss) else ~reached) & ~jnp.isnan(logits).any(axis=-1)


def is_targeted(loss: Loss | None) -> bool:
    """Whether a loss is one of `targeted`, however often wrapped by `functools.partial` or JAX's `Partial`."""
    while hasattr(loss, "func"):
        loss = loss.func  # pyright: ignore
    return isinstance(loss, Targeted)


def _is_classes(logits: Array, target: Array) -> bool:
    if jnp.issubdtype(target.dtype, jnp.integer) and target.shape == logits.shape[:-1]:
        return True
    if jnp.issubdtype(target.dtype, jnp.floating) and target.shape == logits.shape:
        return False
    raise ValueError(
        f"target must be integer classes of shape {logits.shape[:-1]} or floats of shape {logits.shape}, "
        f"got {target.dtype}{target.shape}"
    )


def _check_classes(logits: Array, target: Array, *, at_least: int, name: str) -> None:
    if not _is_classes(logits, target):
        raise ValueError(f"{name} needs integer classes as target, got {target.dtype}{target.shape}")
    if logits.shape[-1] < at_least:
        raise ValueError(f"{name} needs at least {at_least} classes, got logits of shape {logits.shape}")


def _pick(values: Array, classes: Array) -> Array:
    # Of a class that is not there NaN: below zero too, where an index would count from the end.
    classes = jnp.where(classes < 0, values.shape[-1], classes)
    return jnp.take_along_axis(values, classes[..., None], axis=-1, mode="fill")[..., 0]


def _falling(logits: Array, count: int) -> list[Array]:
    """The largest logits in falling order; for `jax.lax.top_k` every device would gather the rows of all."""
    found = []
    for _ in range(count):
        best = jnp.argmax(logits, axis=-1)
        found.append(_pick(logits, best))
        logits = jnp.where(jnp.arange(logits.shape[-1]) == best[..., None], -jnp.inf, logits)
    return found


def _best_other(logits: Array, classes: Array) -> Array:
    is_class = jnp.arange(logits.shape[-1]) == classes[..., None]
    # By place, not by `jnp.max`, whose gradient is lost where a compiler computes logits and maximum in different ways.
    return _pick(logits, jnp.argmax(jnp.where(is_class, -jnp.inf, logits), axis=-1))
