"""``jaxnets evaluate``: attacks trained networks harder, and writes one table and one picture."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxnets import attacks, certificates, losses, plots
from jaxnets.cli import Evaluate
from jaxnets.commands.run import Run, load, versions, warn_of_unfinished, write_json
from jaxnets.commands.settings import check_at_least, check_seed
from jaxnets.diagnostics import masked_gradients
from jaxnets.evaluation import Report, robustness_curve, table
from jaxnets.evaluation import evaluate as evaluate_attacks
from jaxnets.threats import Threat
from jaxnets.types import Attack
from jaxnets.verification import Examples, accuracy_interval, save_examples


def _pgd_three_times(c: Evaluate, threat: Threat, classes: int) -> dict[str, Attack]:
    pgd = partial(attacks.pgd, threat=threat, steps=c.steps)
    return {
        f"pgd-{c.steps}x{c.restarts} {name}": _as_asked(c, attacks.restarts(partial(pgd, loss=loss), c.restarts))
        for name, loss in (("ce", losses.cross_entropy), ("margin", losses.margin), ("dlr", losses.dlr))
    }


def _cascade(version: Callable[..., dict[str, Attack]], name: str):
    def suite(c: Evaluate, threat: Threat, classes: int) -> dict[str, Attack]:
        stages = version(threat, classes=classes)
        return {name: attacks.cascade({stage: _as_asked(c, attack) for stage, attack in stages.items()})}

    return suite


def _as_asked(c: Evaluate, attack: Attack) -> Attack:
    return attacks.eight_bit(attack) if c.eight_bit else attack


SUITES: dict[str, Callable[[Evaluate, Threat, int], dict[str, Attack]]] = {
    "pgd": _pgd_three_times,
    "autoattack": _cascade(attacks.standard, "autoattack"),
    "autoattack_plus": _cascade(attacks.plus, "autoattack plus"),
    "autoattack_rand": _cascade(attacks.rand, "autoattack rand"),
}
MARGINS: dict[str, certificates.Margins] = {
    "intervals": certificates.interval_margins,
    "crown": certificates.tightest_margins,
}

# Attacks that are made once are compiled once for all runs.
_PGD_20 = partial(attacks.pgd, steps=20)


@lru_cache(maxsize=16)
def _suite(command: Evaluate, threat: Threat, classes: int) -> dict[str, Attack]:
    return SUITES[command.attack](command, threat, classes)


def evaluate(command: Evaluate) -> None:
    """Attacks every run and writes one table and one picture."""
    if not command.runs:
        raise ValueError("name at least one run to evaluate: jaxnets evaluate RUN [RUN ...]")
    check_at_least(command, steps=1, restarts=1, examples=1)
    check_seed(command.seed)
    if command.epsilon is not None:
        check_at_least(command, epsilon=0)
    if command.attack != "pgd" and (command.steps, command.restarts) != (Evaluate.steps, Evaluate.restarts):
        raise ValueError(f"--steps and --restarts are of pgd, {command.attack} has its own: leave them out")
    # Before the first attack, for the last of them may take hours: a run that is none, a folder that is read only.
    runs = {folder: _load(command, folder) for folder in command.runs}
    out = command.out or command.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to: say another folder with --out")
    reports, curves, numbers = {}, {}, {}
    for folder, (run, model) in runs.items():
        reports[str(folder)] = report = _attack(command, run, model)
        curves[str(folder)] = pgd_curve(run, model)
        print(f"{folder} in {run.threat}: worst case {report.accuracies()['worst case']:.2%}\n{report.costs()}")
        masked = masked_gradients(run.attack_key, model, run.x[:200], run.y[:200], threat=run.threat)
        print(masked, flush=True)
        numbers[str(folder)] = {
            **as_json(report),
            "threat": str(run.threat),
            "milliseconds a row": {name: 1000 * seconds for name, seconds in report.seconds.items()},
            "masked gradients": masked._asdict() | {"signs": masked.signs()},
        }
        write_json(out / "evaluation.json", numbers)
        if command.save:
            _save(command, folder, run, report)
    columns = [report.with_bounds() for report in reports.values()]
    rows = {name: [(int(column[name].sum()), len(column[name])) for column in columns] for name in columns[0]}
    print(table(rows, list(reports)))
    plots.accuracy_against_epsilon(out / "evaluation.png", curves, xlabel="epsilon")
    print(f"written: {out}/evaluation.json, evaluation.png")


def _load(command: Evaluate, folder: Path) -> tuple[Run, Any]:
    found = load(
        folder,
        examples=command.examples,
        threat=command.threat,
        epsilon=command.epsilon,
        data_dir=command.data_dir,
        last=command.last,
    )
    warn_of_unfinished(folder)
    return found


def _attack(command: Evaluate, run: Run, model: Any) -> Report:
    suite = _suite(command, run.threat, len(run.dataset.classes))
    key = jax.random.key(command.seed)
    for warning in attacks.check_model(key, model, run.x[:100], run.y[:100]):
        print(f"jaxnets: {warning}", file=sys.stderr)
    bounds = _certificates(command, run.threat)
    with _Bars(len(run.x)) as bars:
        report = evaluate_attacks(
            key, model, run.x, run.y, suite, threat=run.threat, certificates=bounds, on_batch=bars
        )
    for name in suite:
        start = f"{name}: "
        stages = {one.removeprefix(start): rows for one, rows in report.survived.items() if one.startswith(start)}
        for warning in attacks.black_box_wins(stages):
            print(f"jaxnets: {warning}", file=sys.stderr)
    return report


def _certificates(command: Evaluate, threat: Threat) -> dict[str, certificates.Certificate]:
    if command.certify is None:
        return {}
    return {command.certify: partial(certificates.certified, threat=threat, margins=MARGINS[command.certify])}


class _Bars:
    """A progress bar an attack, on a terminal alone."""

    def __init__(self, rows: int):
        self._rows = rows
        self._bars: dict[str, tqdm] = {}

    def __enter__(self):
        return self

    def __call__(self, name: str, rows: int) -> None:
        if name not in self._bars:
            self._bars[name] = tqdm(desc=name, total=self._rows, unit="row", disable=None)
        self._bars[name].update(rows)

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.close()


def _save(command: Evaluate, folder: Path, run: Run, report: Report) -> None:
    which = "-last" * command.last + "-8bit" * command.eight_bit
    threat = f"{type(run.threat).__name__.lower()}{run.threat.epsilon:g}"
    path = folder / f"adversarial-{command.attack}-{threat}{which}.npz"
    config = json.loads(json.dumps(dataclasses.asdict(command), default=str))
    origin = {"run": str(folder.absolute()), "seed": command.seed, "config": config, "versions": versions()}
    save_examples(path, Examples(run.x, run.y, report.examples, report.survived, run.threat, origin))
    print(f"written: {path}; check it with: jaxnets verify {path}")


def as_json(report: Report) -> dict[str, Any]:
    """The numbers of a report by name, those that are the same every time."""

    def entry(name: str, rows: np.ndarray) -> dict[str, Any]:
        correct, total = int(rows.sum()), len(rows)
        said = {"accuracy": correct / total, "rows": total, "interval95": accuracy_interval(correct, total)}
        if name in report.norms:
            mean, median = report.norm_mean_and_median(name)
            said |= {"mean_norm": _finite(mean), "median_norm": _finite(median)}
        if name in report.queries:
            queries = report.queries[name][report.survived["clean"]]
            if len(queries):
                said |= {"mean_queries": float(queries.mean()), "median_queries": float(np.median(queries))}
        return said

    return {name: entry(name, rows) for name, rows in report.with_bounds().items()}


def _finite(value: float) -> float | None:
    """What JSON has a word for."""
    return value if np.isfinite(value) else None


def pgd_curve(run: Run, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of at most 500 test rows under PGD-20 from no perturbation to twice the threat's."""
    epsilons = np.linspace(0, 2 * (run.threat.epsilon or 0.1), 9)
    x, y = run.x[:500], run.y[:500]
    return epsilons, robustness_curve(run.attack_key, model, x, y, _PGD_20, threat=run.threat, epsilons=epsilons)
