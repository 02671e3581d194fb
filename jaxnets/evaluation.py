"""Who survives which attack, with intervals, and verified: adversarial examples are checked by code that made none."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from scipy import stats as scipy_stats

from jaxnets import parallel
from jaxnets.attacks.calling import as_pytree
from jaxnets.data import padded_batches
from jaxnets.threats import L1, L2, Linf, Threat
from jaxnets.types import Array, Attack, LogitsFn

_NUMPY_NORMS = {
    Linf: lambda delta: np.abs(delta).max(axis=1, initial=0.0),
    L2: lambda delta: np.sqrt((delta**2).sum(axis=1)),
    L1: lambda delta: np.abs(delta).sum(axis=1),
}


class InvalidExample(ValueError):  # noqa: N818 - it is the example that is invalid
    """An attack returned something that the threat does not allow."""


class Report(NamedTuple):
    """What an evaluation found.

    Attributes:
      survived: by name, ``clean`` first, whether each row is classified correctly: bool ``[N]``.
      examples: by attack, the adversarial examples ``[N, ...]``; rows that are wrong without one stay as they are.
    """

    survived: dict[str, np.ndarray]
    examples: dict[str, np.ndarray]

    def accuracies(self) -> dict[str, float]:
        """By name, with ``worst case`` last: the fraction of rows that survive everything."""
        return {name: float(rows.mean()) for name, rows in self.with_worst_case().items()}

    def with_worst_case(self) -> dict[str, np.ndarray]:
        """The survivors by name, and row by row those of all together."""
        return {**self.survived, "worst case": np.logical_and.reduce(list(self.survived.values()))}

    def __str__(self) -> str:
        return table({name: [(int(rows.sum()), len(rows))] for name, rows in self.with_worst_case().items()})


def evaluate(
    key: Array,
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    attacks: Mapping[str, Attack],
    *,
    threat: Threat,
    batch_size: int = 500,
    mesh: Mesh | None = None,
    on_batch: Callable[[str, int], None] = lambda name, rows: None,
) -> Report:
    """Accuracy without an attack, under each one, and under their pointwise worst case; ``print`` it for a table.

    A row that is wrong without an attack counts as not surviving any and is not attacked. A row's result does not
    depend on the batch that it comes in: its key is made from its number.

    Args:
      key: of the attacks.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: rows ``[N, ...]``, float, inside the threat's box.
      y: classes ``[N]``.
      attacks: by name, untargeted.
      threat: what the attacks were allowed: their results are checked against it.
      batch_size: rows attacked at once; rounded up to a multiple of the devices.
      mesh: devices; all of them unless given.
      on_batch: told the attack's name and how many rows were done, after each batch.

    Raises:
      InvalidExample: where a result is not finite, or outside the box or the ball.
      ValueError: without rows, or where ``x`` and ``y`` do not fit.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"evaluate needs as many classes as rows, and at least one: got {len(x)} rows, {len(y)} classes"
        )
    mesh = parallel.data_mesh() if mesh is None else mesh
    batch_size = -(-min(batch_size, len(x)) // mesh.size) * mesh.size
    run = partial(_by_batches, key, as_pytree(logits_fn), batch_size=batch_size, mesh=mesh)
    clean = run(None, x, y, np.arange(len(x)), lambda rows: on_batch("clean", rows))[1]
    right = np.flatnonzero(clean)
    survived, examples = {"clean": clean}, {}
    for name, attack in attacks.items():
        examples[name], survived[name] = x.copy(), np.zeros(len(x), bool)
        if len(right):
            found, correct = run(attack, x[right], y[right], right, partial(on_batch, name))
            verify(name, found, x[right], threat)
            examples[name][right], survived[name][right] = found, correct
        on_batch(name, len(x) - len(right))
    return Report(survived, examples)


def verify(name: str, x_adv: np.ndarray, x: np.ndarray, threat: Threat) -> None:
    """Raises `InvalidExample` unless every row is finite, inside the box and inside the ball.

    In numpy and double precision; the tolerance for single-precision rounding is ``1e-6 max(1, epsilon)``.
    """
    epsilon = float(threat.epsilon)
    tolerance = 1e-6 * max(1.0, epsilon)
    x_adv, x = np.asarray(x_adv, np.float64), np.asarray(x, np.float64)
    size = _NUMPY_NORMS[type(threat)]((x_adv - x).reshape(len(x), -1))
    outside = np.maximum(x_adv - threat.upper, threat.lower - x_adv).reshape(len(x), -1).max(axis=1, initial=-np.inf)
    for bad, what in [
        (~np.isfinite(x_adv).reshape(len(x), -1).all(axis=1), "is not finite"),
        (outside > tolerance, f"leaves the box [{threat.lower}, {threat.upper}]"),
        (size > epsilon + tolerance, f"leaves the ball: the largest perturbation is {size.max():.8g} in {threat}"),
    ]:
        if bad.any():
            rows = np.flatnonzero(bad)
            raise InvalidExample(
                f"attack {name!r}: {len(rows)} of {len(x)} examples are not allowed: row {rows[0]} {what}. "
                "Nothing is reported; mend the attack"
            )


def robustness_curve(
    key: Array,
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    attack: Callable[..., Array],
    *,
    threat: Threat,
    epsilons: np.ndarray,
) -> np.ndarray:
    """Accuracy at each of ``epsilons[E]``, rising: float ``[E]``, by one compiled call for all of them.

    A row that falls at one epsilon counts as fallen at every larger one, since the smaller ball lies in the larger.

    Args:
      attack: ``(key, logits_fn, x, y, *, threat) -> x_adv``, such as `attacks.pgd` without a step size.
      threat: whose epsilon is replaced.
      key, logits_fn, x, y: as for `evaluate`; all rows are attacked at once.

    Raises:
      InvalidExample: as `evaluate` does.
    """
    found, correct = _sweep(
        Partial(attack), key, as_pytree(logits_fn), jnp.asarray(x), y, threat, jnp.asarray(epsilons)
    )
    for epsilon, x_adv in zip(epsilons, np.asarray(found), strict=True):
        verify(f"epsilon {epsilon}", x_adv, x, dataclasses.replace(threat, epsilon=epsilon))  # pyright: ignore
    return np.logical_and.accumulate(np.asarray(correct)).mean(axis=1)


@jax.jit
def _sweep(attack, key, logits_fn, x, y, threat, epsilons):
    def at(epsilon):
        x_adv = attack(key, logits_fn, x, y, threat=dataclasses.replace(threat, epsilon=epsilon))
        return x_adv, jnp.argmax(logits_fn(x_adv), axis=-1) == y

    return jax.lax.map(at, epsilons)


def accuracy_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a proportion: at least ``level`` of such intervals hold the true one.

    >>> low, high = accuracy_interval(0, 10)
    >>> print(round(low, 4), round(high, 4))
    0.0 0.3085
    """
    tail = (1 - level) / 2
    low = scipy_stats.beta.ppf(tail, correct, total - correct + 1) if correct else 0.0
    high = scipy_stats.beta.ppf(1 - tail, correct + 1, total - correct) if correct < total else 1.0
    return float(low), float(high)


def table(rows: Mapping[str, list[tuple[int, int]]], columns: list[str] | None = None) -> str:
    """Accuracies with 95% intervals as text: a line a name, a column for each ``(correct, total)``.

    >>> print(table({"clean": [(9, 10)]}))
                    accuracy    95% interval     rows
    clean             90.00%   55.50 - 99.75   9/10
    """
    width = max(14, *(len(name) for name in rows))
    heads = columns or [""]
    lines = []
    if columns:
        lines.append(" " * width + "".join(f"  {head[-38:]:>38}" for head in heads))
    lines.append(" " * width + "  accuracy    95% interval     rows" * len(heads))
    for name, cells in rows.items():
        lines.append(f"{name:{width}}" + "".join(_cell(*cell) for cell in cells))
    return "\n".join(lines)


def _cell(correct: int, total: int) -> str:
    low, high = accuracy_interval(correct, total)
    return f"  {correct / total:8.2%}   {low * 100:5.2f} - {high * 100:5.2f}   {correct}/{total}"


def _by_batches(key, logits_fn, attack, x, y, numbers, on_rows, *, batch_size, mesh):
    """Runs ``attack`` (None: nothing) over all rows and returns the results and which are classified correctly."""
    sharding = parallel.by_rows(mesh)
    logits_fn, key = parallel.replicate((logits_fn, key), mesh)
    found, correct = np.empty_like(x), np.empty(len(x), bool)
    for rows, valid in padded_batches(len(x), batch_size):
        batch = jax.device_put((np.asarray(numbers[rows], np.uint32), x[rows], y[rows]), sharding)
        row_keys, x_batch, y_batch = _fold_rows(key, batch[0]), *batch[1:]
        x_adv = x_batch if attack is None else attack(row_keys, logits_fn, x_batch, y_batch)
        here = rows[:valid]
        found[here] = np.asarray(x_adv)[:valid]
        correct[here] = np.asarray(_correct(logits_fn, x_adv, y_batch))[:valid]
        on_rows(valid)
    return found, correct


@jax.jit
def _fold_rows(key: Array, numbers: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


@jax.jit
def _correct(logits_fn: Any, x: Array, y: Array) -> Array:
    return jnp.argmax(logits_fn(x), axis=-1) == y
