"""One-step and iterated attacks by the names of their papers: `fgsm` and `pgd` with another start, target or rule."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets.attacks.diversity import diversified
from jaxnets.attacks.gradient import fgsm, pgd
from jaxnets.attacks.parts.calling import as_pytree, check_rows, check_steps
from jaxnets.attacks.parts.rules import by_optax, flat_size, gaussian_kernel, momentum, nesterov, normalized, smoothed
from jaxnets.attacks.parts.start import Start, at_clean, uniform
from jaxnets.attacks.parts.stochastic import expected_logits
from jaxnets.losses import cross_entropy
from jaxnets.threats import L0, Threat
from jaxnets.types import Array, LogitsFn, Loss

_ADAM = normalized(by_optax(optax.adam(1.0)))


def bim(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 10,
    loss: Loss = cross_entropy,
    step_size: Any = None,
) -> Array:
    """Basic iterative method: `pgd` from the clean row, with steps of ``1.25 epsilon / steps`` unless given.

    That is the paper's rule, steps of one grey level and ``1.25 epsilon`` of them, for any number of steps.

    Kurakin et al. 2017, https://arxiv.org/abs/1607.02533.
    """
    check_steps("bim", steps)
    step_size = 1.25 * threat.epsilon / steps if step_size is None else step_size
    options = {"threat": threat, "steps": steps, "step_size": step_size, "start": at_clean}
    return pgd(key, logits_fn, x, target, loss=loss, **options)


def least_likely_class(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    loss: Loss = cross_entropy,
    step_size: Any = None,
) -> Array:
    """One step of `fgsm` towards the class that the model holds least likely at the clean row.

    ``project(x - step_size * direction(grad loss(x, argmin_k logits_k(x))))``, the least among the wrong classes. The
    direction does not depend on the label, so that training on it learns no signal of the label from it.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean rows ``[B, ...]`` inside the threat's box.
      target: the rows' own classes ``[B]`` (or floats ``[B, K]`` whose largest they are). Success is a prediction that
        differs from them, as the paper counts it, whichever class it is.
      threat: the ball and the box.
      loss: lowered for the least likely class.
      step_size: length of the step; epsilon unless given.

    Returns:
      ``x_adv[B, ...]`` inside ball and box, of ``x``'s dtype.

    Kurakin et al. 2017, https://arxiv.org/abs/1607.02533; the single step: https://arxiv.org/abs/1611.01236.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[0.6, 0.5, 0.4]]), jnp.array([0])
    >>> print(least_likely_class(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1)))
    [[0.5 0.4 0.5]]
    """
    steered = _steered(logits_fn, x, target)
    return fgsm(key, logits_fn, x, steered, threat=threat, loss=TowardsLeast(loss), step_size=step_size)


def iterated_least_likely_class(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 10,
    loss: Loss = cross_entropy,
    step_size: Any = None,
) -> Array:
    """`bim` towards the class that the model holds least likely at the clean row; arguments as `least_likely_class`.

    Among the iterates those come first whose prediction is not ``target``, then those where the least likely class is
    likeliest.

    Kurakin et al. 2017, https://arxiv.org/abs/1607.02533.
    """
    options = {"threat": threat, "steps": steps, "step_size": step_size}
    return bim(key, logits_fn, x, _steered(logits_fn, x, target), loss=TowardsLeast(loss), **options)


def mi_fgsm(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 10,
    decay: Any = 1.0,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = at_clean,
) -> Array:
    """Momentum iterative FGSM: `pgd` by the rule `momentum`; arguments as `pgd`.

    ``m <- decay * m + g / |g|_1`` and ``x_{t+1} = project(x_t + step_size * direction(m))``.

    Args:
      decay: how much of the sum so far is kept.
      step_size: ``epsilon / steps`` unless given.

    Dong et al. 2018, https://arxiv.org/abs/1710.06081.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> print(mi_fgsm(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.25), steps=4))
    [[0.25 0.75]]
    """
    check_steps("mi_fgsm", steps)
    step_size = threat.epsilon / steps if step_size is None else step_size
    options = {"threat": threat, "steps": steps, "step_size": step_size, "start": start}
    return pgd(key, logits_fn, x, target, loss=loss, rule=momentum(decay), **options)


def ni_fgsm(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 10,
    decay: Any = 1.0,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = at_clean,
) -> Array:
    """Nesterov iterative FGSM: `pgd` by the rule `nesterov`; arguments as `mi_fgsm`.

    Gradients are taken ahead of the iterates, which therefore are not judged: the result is the last, or the start.

    Lin et al. 2020, https://arxiv.org/abs/1908.06281.
    """
    check_steps("ni_fgsm", steps)
    step_size = threat.epsilon / steps if step_size is None else step_size
    options = {"threat": threat, "steps": steps, "step_size": step_size, "start": start}
    return pgd(key, logits_fn, x, target, loss=loss, rule=nesterov(decay), **options)


def di_fgsm(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 10,
    decay: Any = 0.0,
    probability: Any = 0.5,
    low: Any = 0.9,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = at_clean,
) -> Array:
    """Diverse inputs iterative FGSM: `mi_fgsm` on the `diversified` model; arguments as `mi_fgsm`.

    With a ``decay`` of 1 it is the paper's M-DI2-FGSM. Images only, ``x[B, H, W, C]``.

    Args:
      probability: of an image to be shrunk and padded before a gradient.
      low: the smallest scale.

    Xie et al. 2019, https://arxiv.org/abs/1803.06978.
    """
    options = {"threat": threat, "steps": steps, "step_size": step_size, "start": start, "decay": decay}
    return mi_fgsm(key, diversified(logits_fn, probability, low), x, target, loss=loss, **options)


def ti_fgsm(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 10,
    decay: Any = 0.0,
    kernel: Any = None,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = at_clean,
) -> Array:
    """Translation-invariant iterative FGSM: `pgd` by the rule `smoothed`; arguments as `mi_fgsm`.

    With a ``decay`` of 1 it is the paper's TI-MI-FGSM, and on a `diversified` model TI-DIM. Images only,
    ``x[B, H, W, C]``.

    Args:
      kernel: ``[k, k]``; `gaussian_kernel` of 15 pixels unless given.

    Dong et al. 2019, https://arxiv.org/abs/1904.02884.

    >>> import jaxnets as jn
    >>> from functools import partial
    >>> net = lambda x: x.mean(axis=(1, 2))
    >>> m_di_ti = partial(ti_fgsm, decay=1.0, kernel=gaussian_kernel(7), threat=jn.Linf(0.25), steps=4)
    >>> x, y = jnp.full((1, 8, 8, 2), 0.5), jnp.array([0])
    >>> print(m_di_ti(jax.random.key(0), diversified(net), x, y)[0, 4, 4])
    [0.25 0.75]
    """
    check_steps("ti_fgsm", steps)
    step_size = threat.epsilon / steps if step_size is None else step_size
    rule = smoothed(gaussian_kernel() if kernel is None else kernel, momentum(decay))
    options = {"threat": threat, "steps": steps, "step_size": step_size, "start": start}
    return pgd(key, logits_fn, x, target, loss=loss, rule=rule, **options)


def adam_pgd(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    steps: int = 40,
    loss: Loss = cross_entropy,
    step_size: Any = None,
    start: Start = uniform,
) -> Array:
    """PGD whose steps are Adam's: `pgd` by the rule `by_optax`; arguments as `pgd`.

    Gradients are first divided by their mean magnitude, so that Adam's ``eps`` does not stop small ones.

    Args:
      step_size: Adam's learning rate, how far its first step moves every coordinate, in units of the data. Unless given
        that which makes a step of this kind ``2.5 epsilon / steps`` long; in L0, where a coordinate may go anywhere,
        the width of the box.

    Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; in attacks Uesato et al. 2018,
    https://arxiv.org/abs/1802.05666.

    >>> import jaxnets as jn
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> print(adam_pgd(jax.random.key(0), lambda x: x, x, y, threat=jn.Linf(0.1)))
    [[0.4 0.6]]
    """
    check_rows(x, target)
    check_steps("adam_pgd", steps)
    if step_size is None and isinstance(threat, L0):
        step_size = threat.upper - threat.lower
    elif step_size is None:
        step_size = 2.5 * threat.epsilon / steps / flat_size(threat, x[0])
    options = {"threat": threat, "steps": steps, "step_size": step_size, "start": start}
    return pgd(key, logits_fn, x, target, loss=loss, rule=_ADAM, **options)


@dataclass(frozen=True)
class TowardsLeast:
    """The negative of a loss for the class whose entry in ``target[..., K]`` is smallest; the largest is the row's own.

    An untargeted loss: `losses.succeeded` asks whether the row's own class is lost.
    """

    loss: Loss

    def __call__(self, logits: Array, target: Array) -> Array:
        return -self.loss(logits, jnp.argmin(target, axis=-1))


def _steered(logits_fn: LogitsFn, x: Array, target: Array) -> Array:
    """What `TowardsLeast` takes, ``[B, K]``: 1 at the row's class, -1 at the least likely of the others."""
    check_rows(x, target)
    return _marked(as_pytree(logits_fn), x, target)


@jax.jit
def _marked(logits_fn: LogitsFn, x: Array, target: Array) -> Array:
    logits = expected_logits(logits_fn, x)
    own = target if target.ndim == 1 else jnp.argmax(target, axis=-1)
    classes = jnp.arange(logits.shape[1])
    is_own = classes == own[:, None]
    least = jnp.argmin(jnp.where(is_own, jnp.inf, logits), axis=-1)
    return jnp.where(is_own, 1, jnp.where(classes == least[:, None], -1, 0)).astype(logits.dtype)
