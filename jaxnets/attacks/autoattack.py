"""AutoAttack: a fixed suite of attacks without parameters to tune, each on the rows that survived those before."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import jax
from jax.core import Tracer

from jaxnets.attacks.apgd import apgd, apgd_targeted
from jaxnets.attacks.cascade import Cascade, cascade
from jaxnets.attacks.checks import DRAWS, ModelWarning, black_box_wins, check_model
from jaxnets.attacks.combinators import restarts, worst_of
from jaxnets.attacks.fab import fab, fab_targeted, halfway
from jaxnets.attacks.parts.calling import check_rows, row_keys
from jaxnets.attacks.parts.on_host import checked_data
from jaxnets.attacks.parts.stochastic import Stochastic
from jaxnets.attacks.square import square
from jaxnets.losses import dlr, margin
from jaxnets.threats import L1, Threat
from jaxnets.types import Array, Attack, LogitsFn, Loss

Version = Callable[..., dict[str, Attack]]
"""``(threat, *, classes) -> attacks by name``, in the order in which they run."""


def standard(threat: Threat, *, classes: int = 10) -> dict[str, Attack]:
    """APGD on cross-entropy, APGD-T, FAB-T and Square.

    APGD and FAB take 100 steps, towards the nine likeliest other classes or all of them; Square 5,000 queries. In L1
    APGD starts five times, and APGD-T goes towards five classes. APGD-T needs four classes: with fewer it gives way to
    APGD on `dlr` (three) or `margin` (two).
    """
    once = partial(apgd, threat=threat)
    return {
        "apgd-ce": restarts(once, 5) if isinstance(threat, L1) else once,
        **_targeted_apgd(threat, classes),
        "fab-t": partial(fab_targeted, threat=threat, classes=min(9, classes - 1)),
        "square": partial(square, threat=threat, queries=5000, horizon=10_000),
    }


def plus(threat: Threat, *, classes: int = 10) -> dict[str, Attack]:
    """APGD on cross-entropy and `dlr`, and FAB, with five restarts each; Square; then APGD-T and FAB-T."""
    return {
        "apgd-ce": restarts(partial(apgd, threat=threat), 5),
        **_dlr_apgd(threat, classes, lambda attack: restarts(attack, 5)),
        "fab": worst_of(partial(fab, threat=threat), restarts(partial(fab, threat=threat, start=halfway), 4)),
        "square": partial(square, threat=threat, queries=5000, horizon=10_000),
        **(_targeted_apgd(threat, classes) if classes > 3 else {}),
        "fab-t": partial(fab_targeted, threat=threat, classes=min(9, classes - 1)),
    }


def rand(threat: Threat, *, classes: int = 10) -> dict[str, Attack]:
    """For models that draw: APGD on cross-entropy and `dlr`, on mean gradients of 20 draws of a `Stochastic` model."""
    averaged = lambda attack: averaged_over(20, attack)  # noqa: E731
    return {"apgd-ce": averaged(partial(apgd, threat=threat)), **_dlr_apgd(threat, classes, averaged)}


def autoattack(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    target: Array,
    *,
    threat: Threat,
    version: Version = standard,
    batch_size: int | None = None,
) -> Array:
    """AutoAttack: each row's example from the first attack of ``version`` that breaks it, else the clean row.

    Between attacks the survivors are gathered on the host: it does not run inside ``jax.jit``. `cascade` of a version's
    attacks is the same for `evaluation.evaluate`, which reports it attack by attack.

    Args:
      key: one key, or one a row ``[B]``.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: clean images ``[B, H, W, C]`` inside the threat's box.
      target: the true classes ``[B]``.
      threat: `Linf`, `L2` or `L1`.
      version: `standard`, `plus`, `rand`, or a function of the same form: ``lambda threat, classes: {"pgd": ...}``.
      batch_size: rows attacked at once; `parallel.rows_at_once` unless given.

    Returns:
      ``x_adv[B, ...]`` inside ball and box.

    Raises:
      ValueError: for shapes or dtypes that do not fit, rows outside the box, an epsilon for each row, or inside
        ``jax.jit``.

    Warns:
      ModelWarning: where the model draws and ``version`` does not average, where it returns probabilities, has zero
        gradients or few classes, or where Square breaks what white-box attacks did not: see `check_model`.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690.
    """
    if isinstance(x, Tracer):
        raise ValueError("autoattack gathers surviving rows on the host: call it outside jit, or use worst_of")
    check_rows(x, target)
    checked_data("autoattack", x, threat)
    if version in (standard, plus) and x.ndim not in (3, 4):
        raise ValueError(f"autoattack takes images [B, H, W, C] or [B, H, W], for Square, got shape {list(x.shape)}")
    classes = jax.eval_shape(logits_fn, x).shape[-1]
    doubts = check_model(row_keys(key, len(x))[:500], logits_fn, x[:500], target[:500])
    if version is rand and isinstance(logits_fn, Stochastic):
        doubts = [doubt for doubt in doubts if doubt != DRAWS]
    # Made once for an epsilon that compares: what a suite is made of is compiled once then, too.
    make = _cached_suite if isinstance(threat.epsilon, float | int) else _suite
    done = make(version, threat, classes, batch_size).run(key, logits_fn, x, target)
    for doubt in [*doubts, *black_box_wins(done.survived)]:
        warnings.warn(doubt, ModelWarning, stacklevel=2)
    return jax.numpy.asarray(done.x)


def _suite(version: Version, threat: Threat, classes: int, batch_size: int | None) -> Cascade:
    return cascade(version(threat, classes=classes), batch_size=batch_size)


_cached_suite = lru_cache(maxsize=16)(_suite)


def averaged_over(samples: int, attack: Attack) -> Attack:
    """The attack on a `Stochastic` model with ``samples`` draws a gradient, whatever it had; else as it is."""

    def averaged(key: Array, logits_fn: LogitsFn, x: Array, target: Array) -> Array:
        if isinstance(logits_fn, Stochastic):
            logits_fn = replace(logits_fn, samples=samples)
        return attack(key, logits_fn, x, target)

    return averaged


def _targeted_apgd(threat: Threat, classes: int) -> dict[str, Attack]:
    if classes > 3:
        most = 5 if isinstance(threat, L1) else 9
        return {"apgd-t": partial(apgd_targeted, threat=threat, classes=min(most, classes - 1))}
    return _dlr_apgd(threat, classes, lambda attack: attack)


def _dlr_apgd(threat: Threat, classes: int, wrapped: Callable[[Attack], Attack]) -> dict[str, Attack]:
    loss: Loss = dlr if classes > 2 else margin
    return {f"apgd-{loss.__name__}": wrapped(partial(apgd, threat=threat, loss=loss))}
