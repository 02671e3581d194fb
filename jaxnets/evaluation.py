"""Who survives which attack, with intervals, and verified: adversarial examples are checked by code that made none."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxnets import parallel
from jaxnets.attacks.cascade import Cascade, Cascaded
from jaxnets.attacks.parts.calling import as_pytree, checked_logits
from jaxnets.attacks.parts.on_host import Attacked, attack_rows, checked_data, host_keys
from jaxnets.certificates.on_host import certify_rows
from jaxnets.certificates.rows import Certificate
from jaxnets.losses import is_right
from jaxnets.threats import Threat
from jaxnets.types import Array, Attack, LogitsFn
from jaxnets.verification import accuracy_interval, norms, verify


class CrossedBounds(ValueError):  # noqa: N818 - it is the bounds that cross
    """A row is certified, and an attack in the same threat has broken it."""


class Report(NamedTuple):
    """What an evaluation found.

    Attributes:
      survived: by name, ``clean`` first, whether each row is classified correctly: bool ``[N]``. The attacks of a
        cascade stand before it, each with the rows that survived it and those before it.
      examples: by attack, the adversarial examples ``[N, ...]``; rows that are wrong without one stay as they are.
      norms: by attack, the size of each row's perturbation in the threat's norm, float ``[N]``: 0 where the row is
        wrong without one, infinite where it survives.
      queries: by attack that counts them, how many each row has cost, ``[N]``; 0 for rows that were not attacked.
      seconds: by attack, wall time a row attacked, compilation included.
      certified: by certificate, whether each row is right under every attack that there can be: bool ``[N]``.
    """

    survived: dict[str, np.ndarray]
    examples: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    queries: dict[str, np.ndarray]
    seconds: dict[str, float]
    certified: dict[str, np.ndarray]

    def accuracies(self) -> dict[str, float]:
        """By name, with ``worst case`` last: the fraction of rows that survive everything."""
        return {name: float(rows.mean()) for name, rows in self.with_worst_case().items()}

    def with_worst_case(self) -> dict[str, np.ndarray]:
        """The survivors by name, and row by row those of all together."""
        return {**self.survived, "worst case": np.logical_and.reduce(list(self.survived.values()))}

    def with_bounds(self) -> dict[str, np.ndarray]:
        """`with_worst_case`, and below it by certificate the rows that it holds."""
        return {**self.with_worst_case(), **{f"certified: {name}": rows for name, rows in self.certified.items()}}

    def bounds(self) -> tuple[float, float]:
        """Between which robust accuracy on these rows lies: those that a certificate holds, the worst case."""
        held = np.logical_or.reduce([np.zeros_like(self.survived["clean"]), *self.certified.values()])
        return float(held.mean()), self.accuracies()["worst case"]

    def accuracy_at(self, name: str, epsilons: np.ndarray) -> np.ndarray:
        """Accuracy at each of ``epsilons[E]`` by the smallest perturbations that the attack ``name`` has found."""
        return (self.norms[name] > np.asarray(epsilons)[:, None]).mean(axis=1)

    def costs(self) -> str:
        """A line an attack: norms of the perturbations that succeeded, queries, milliseconds a row."""
        heads = f"{'mean norm':>11}{'median':>9}{'queries: mean':>15}{'median':>9}{'ms a row':>10}"
        width = max(14, *(len(name) for name in self.norms))
        return "\n".join([" " * width + heads, *(f"{name:{width}}" + self._cost(name) for name in self.norms)])

    def norm_mean_and_median(self, name: str) -> tuple[float, float]:
        """The mean over the rows that the attack broke, NaN where there are none; the median over all right rows."""
        sizes = self.norms[name][self.survived["clean"]]
        broken = sizes[np.isfinite(sizes)]
        return (float(np.mean(broken)), float(np.median(sizes))) if len(broken) else (np.nan, np.inf)

    def _cost(self, name: str) -> str:
        mean, median = self.norm_mean_and_median(name)
        queries = self.queries.get(name, np.zeros(0))
        asked = queries[queries > 0]
        counts = f"{asked.mean():15.0f}{np.median(asked):9.0f}" if len(asked) else f"{'-':>15}{'-':>9}"
        return f"{mean:11.4g}{median:9.4g}{counts}{1000 * self.seconds[name]:10.2f}"

    def __str__(self) -> str:
        return table({name: [(int(rows.sum()), len(rows))] for name, rows in self.with_bounds().items()})


def evaluate(
    key: Array,
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    attacks: Mapping[str, Attack],
    *,
    threat: Threat,
    certificates: Mapping[str, Certificate] = MappingProxyType({}),
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    on_batch: Callable[[str, int], None] = lambda name, rows: None,
) -> Report:
    """Accuracy without an attack, under each one, and under their pointwise worst case; ``print`` it for a table.

    A row that is wrong without an attack counts as not surviving any and is not attacked. A row's result does not
    depend on the batch that it comes in: its key is made from its number. A `attacks.cascade` is reported stage by
    stage.

    Of a network in half precision compilers leave out roundings, in one program others than in the next: points that an
    attack left just beyond the boundary may be right again. Under ``XLA_FLAGS=--xla_allow_excess_precision=false`` all
    are kept.

    Args:
      key: of the attacks.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: rows ``[N, ...]``, float, inside the threat's box.
      y: classes ``[N]``.
      attacks: by name, untargeted.
      threat: what the attacks were allowed: their results are checked against it.
      certificates: by name, of the same threat, such as ``partial(certificates.certified, threat=threat)``: below the
        worst case, an upper bound of robust accuracy, stands what they certify, a lower one.
      batch_size: rows attacked at once, rounded up to a multiple of the devices; `parallel.rows_at_once` unless given.
      mesh: devices along an automatic axis ``data``, as of `parallel.data_mesh`; all of them unless given.
      on_batch: told the attack's name and how many rows were done, after each batch.

    Raises:
      InvalidExample: where a result is not finite, or outside the box or the ball.
      CrossedBounds: where a row that is certified has fallen.
      ValueError: without rows, where ``x`` and ``y`` do not fit, ``x`` is not finite and inside the box, a class is not
        among the K, or an attack is called ``clean`` or ``worst case``.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"evaluate needs as many classes as rows, and at least one: got {len(x)} rows, {len(y)} classes"
        )
    x, y = checked_data("evaluate", x, threat), np.asarray(y)
    _check_classes("evaluate", logits_fn, x, y)
    taken = sorted({"clean", "worst case"} & attacks.keys())
    if taken:
        raise ValueError(f"attacks may not be called {' or '.join(taken)}, which is another line of the report")
    mesh = parallel.mesh_or_all(mesh)
    keys = host_keys(key, len(x))
    on_rows = partial(attack_rows, logits_fn=as_pytree(logits_fn), batch_size=batch_size, mesh=mesh)
    clean = on_rows(None, keys, x=x, target=y, on_rows=partial(on_batch, "clean")).correct
    report = Report({"clean": clean}, {}, {}, {}, {}, {})
    for name, certificate in certificates.items():
        told = partial(on_batch, f"certified: {name}")
        report.certified[name] = certify_rows(
            certificate, logits_fn, x, y, batch_size=batch_size, mesh=mesh, on_rows=told
        )
    right = np.flatnonzero(clean)
    for name, attack in attacks.items():
        began = time.monotonic()
        if isinstance(attack, Cascade):
            told = lambda stage, done, name=name: on_batch(f"{name}: {stage}", done)  # noqa: E731
            done = attack.run(keys[right].wrapped(), logits_fn, x[right], y[right], mesh=mesh, on_batch=told)
            for stage, survived in done.survived.items():
                report.survived[f"{name}: {stage}"] = _over(np.zeros(len(x), bool), right, survived)
        else:
            done = on_rows(attack, keys[right], x=x[right], target=y[right], on_rows=partial(on_batch, name))
        verify(name, done.x, x[right], threat)
        _add(report, name, done, right, x, threat, (time.monotonic() - began) / max(1, len(right)))
        on_batch(name, len(x) - len(right))
    for name, held in report.certified.items():
        _check_crossing(name, held, report.survived, threat)
    return report


@jax.jit
def _logits(logits_fn: LogitsFn, x: Array) -> Array:
    return logits_fn(x)


def _check_classes(name: str, logits_fn: LogitsFn, x: np.ndarray, y: np.ndarray) -> None:
    # By a jitted function, whose shapes are kept: training evaluates the same network again and again.
    row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    classes = _logits.eval_shape(as_pytree(logits_fn), row).shape[-1]
    fits = y.shape == x.shape[:1] and np.issubdtype(y.dtype, np.integer)
    if not (fits and np.min(y) >= 0 and np.max(y) < classes):
        raise ValueError(
            f"{name} takes integer classes from 0 to {classes - 1}, one for each of {len(x)} rows, got "
            f"{y.dtype}{list(y.shape)} from {np.min(y)} to {np.max(y)}"
        )


def _check_crossing(certificate: str, held: np.ndarray, survived: Mapping[str, np.ndarray], threat: Threat) -> None:
    for name, rows in survived.items():
        fallen = np.flatnonzero(held & ~rows)
        if len(fallen):
            raise CrossedBounds(
                f"row {fallen[0]} ({len(fallen)} of {len(rows)} rows) is certified by {certificate!r} and wrong under "
                f"{name!r} in {threat}: one of the two is mistaken. Nothing is reported; see whether the certificate "
                "is of this threat and this network, in inference mode, and leaves enough slack for rounding"
            )


def _add(
    report: Report,
    name: str,
    done: Attacked | Cascaded,
    right: np.ndarray,
    x: np.ndarray,
    threat: Threat,
    seconds: float,
) -> None:
    """Writes into the report what an attack did to the rows numbered ``right``."""
    report.examples[name] = _over(x, right, done.x)
    report.survived[name] = _over(np.zeros(len(x), bool), right, done.correct)
    sizes = np.where(done.correct, np.inf, norms(threat, done.x, x[right]))
    report.norms[name] = _over(np.zeros(len(x)), right, sizes)
    report.seconds[name] = seconds
    if done.queries is not None:
        report.queries[name] = _over(np.zeros(len(x), np.int64), right, done.queries)


def _over(background: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    whole = background.copy()
    whole[rows] = values
    return whole


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
      ValueError: as it does, and where epsilons do not rise from 0 or more.
    """
    if not (np.diff(epsilons, prepend=-np.finfo(float).tiny) > 0).all():
        raise ValueError(f"robustness_curve takes epsilons that rise from 0 or more, got {epsilons}")
    x, y = checked_data("robustness_curve", x, threat), np.asarray(y)
    _check_classes("robustness_curve", logits_fn, x, y)
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
        return x_adv, is_right(checked_logits(logits_fn(x_adv), x_adv), y)

    return jax.lax.map(at, epsilons)


def table(rows: Mapping[str, list[tuple[int, int]]], columns: list[str] | None = None) -> str:
    """Accuracies with 95% intervals as text: a line a name, a column for each ``(correct, total)``.

    >>> print(table({"clean": [(9, 10)]}))
                    accuracy    95% interval     rows
    clean             90.00%   55.50 - 99.75   9/10
    """
    width = max(14, *(len(name) for name in rows))
    names = [f"{name:{width}}" for name in ("", "", *rows)]
    cells = [_column(*column) for column in zip(columns or [""], *rows.values(), strict=True)]
    lines = ["".join(line).rstrip() for line in zip(names, *cells, strict=True)]
    return "\n".join(lines if columns else lines[1:])


def _column(head: str, *cells: tuple[int, int]) -> list[str]:
    """The lines of a column, all as wide as the widest."""
    lines = ["  accuracy    95% interval     rows", *(_cell(*cell) for cell in cells)]
    head = "  " + head[-38:]
    width = max(len(line) for line in (head, *lines))
    return [head.rjust(width), *(line.ljust(width) for line in lines)]


def _cell(correct: int, total: int) -> str:
    low, high = accuracy_interval(correct, total)
    return f"  {correct / total:8.2%}   {low * 100:5.2f} - {high * 100:<6.2f}  {correct}/{total}"
