"""What `jaxnets train` finds out about networks: a look now and then, and at the end tables and pictures."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxnets import attacks, certificates, data, losses, plots
from jaxnets.commands.evaluate import as_json, pgd_curve
from jaxnets.commands.run import Run, is_finite, model_of, write_json
from jaxnets.commands.settings import TRAITS, Settled
from jaxnets.evaluation import Report
from jaxnets.evaluation import evaluate as evaluate_attacks
from jaxnets.fit import restore_best
from jaxnets.metrics import read_metrics
from jaxnets.sweeps import member
from jaxnets.training import TrainState
from jaxnets.types import Attack


class Kept(NamedTuple):
    """A state that a run has kept: the step that it is from, and how it fares on the test rows."""

    step: int
    report: Report


def look(command: Settled, run: Run, state: TrainState) -> dict[str, float]:
    """Accuracy without and under PGD-20 on the rows that are watched."""
    attack = partial(attacks.pgd, threat=run.threat, steps=20)
    model, (x, y) = model_of(run.net, state), run.watched
    found = evaluate_attacks(run.attack_key, model, x, y, {"robust": attack}, threat=run.threat).accuracies()
    where = "held-out " if command.held_out else ""
    return {f"{where}{name}": found[name] for name in ("clean", "robust")}


def look_at_all(command: Settled, runs: Sequence[Run], states: TrainState) -> dict[str, list[float]]:
    """`look` at each network; one that has diverged is right nowhere."""
    found = []
    for number, run in enumerate(runs):
        state = member(states, number)
        found.append(look(command, run, state) if is_finite(state) else {})
    names = next((list(values) for values in found if values), [])
    return {name: [values.get(name, 0.0) for values in found] for name in names}


def finish(folder: Path, command: Settled, run: Run, last: TrainState) -> dict[str, Kept]:
    """Evaluates and draws into the run's folder: the ``best`` state where one was kept, and the ``last``.

    Those that have diverged are left out.
    """
    scored = restore_best(folder, run.state)
    states = {"best": scored[0], "last": last} if scored else {"last": last}
    kept: dict[str, Kept] = {}
    for name, state in states.items():
        if is_finite(state):
            there = [one for one in kept.values() if one.step == int(state.step)]
            kept[name] = there[0] if there else Kept(int(state.step), _report(command, run, state))
            path = folder / ("report.json" if name == next(iter(states)) else f"report-{name}.json")
            write_json(path, as_json(kept[name].report))
    for name in list(kept)[:1]:
        _draw(folder, command, run, model_of(run.net, states[name]), kept[name].report)
    return kept


def _report(command: Settled, run: Run, state: TrainState) -> Report:
    pgd = partial(attacks.pgd, threat=run.threat, steps=40)
    suite: dict[str, Attack] = {
        "fgsm": partial(attacks.fgsm, threat=run.threat),
        "pgd-40": pgd,
        "pgd-40 margin": partial(pgd, loss=losses.margin),
    }
    bounds = (
        {"bounds": partial(certificates.certified, threat=run.threat)} if TRAITS[command.objective].certifies else {}
    )
    model = model_of(run.net, state)
    return evaluate_attacks(run.attack_key, model, run.x, run.y, suite, threat=run.threat, certificates=bounds)


def _draw(folder: Path, command: Settled, run: Run, model: Any, report: Report) -> None:
    per_epoch = data.steps_per_epoch(len(run.dataset.train.labels), command.batch_size)
    plots.training_curves(
        folder / "curves.png", list(read_metrics(folder / "metrics.jsonl")), steps_per_epoch=per_epoch
    )
    curve = {f"{command.objective}, pgd-20": pgd_curve(run, model)}
    plots.accuracy_against_epsilon(
        folder / "robustness.png", curve, xlabel=f"epsilon ({command.threat}; trained with {command.epsilon:g})"
    )
    # Fooled rows say more than survivors: they come first.
    shown = np.argsort(report.survived["pgd-40"] + 2 * ~report.survived["clean"], kind="stable")[:8]
    x, x_adv = run.x[shown], report.examples["pgd-40"][shown]
    predictions = np.asarray(jnp.argmax(model(x), -1)), np.asarray(jnp.argmax(model(x_adv), -1))
    plots.gallery(folder / "gallery.png", x, x_adv, predictions, run.dataset.classes)


def accuracies(report: Report) -> dict[str, float]:
    """By attack, the worst case and certificates last."""
    return {name: float(rows.mean()) for name, rows in report.with_bounds().items()}


Accuracies = dict[str, dict[str, float] | None]
"""Of networks by name, and by attack; None for one that has diverged."""


def grouped(networks: Accuracies) -> list[Accuracies]:
    """Networks that differ in their seeds alone, by what else their names say: the value of what was swept."""
    groups: dict[str, Accuracies] = {}
    for name, found in networks.items():
        groups.setdefault(name.rpartition("seed")[0], {})[name] = found
    return list(groups.values())


def moments(group: Accuracies) -> dict[str, dict[str, float]]:
    """The mean and the standard deviation over the networks that have not diverged, where there are two or more."""
    there = [found for found in group.values() if found]
    if len(there) < 2:
        return {}
    values = {name: [found[name] for found in there] for name in there[0]}
    return {
        "mean": {name: float(np.mean(found)) for name, found in values.items()},
        "deviation": {name: float(np.std(found, ddof=1)) for name, found in values.items()},
    }


def members_table(groups: Sequence[Accuracies]) -> str:
    """A line for each network, and for the mean and the deviation of each group.

    >>> both = {"seed0": {"clean": 0.5}, "seed1": {"clean": 0.7}, "seed2": None}
    >>> print(members_table(grouped(both)))
                    clean
    seed0          50.00%
    seed1          70.00%
    seed2        diverged
    mean           60.00%
    deviation      14.14%
    """
    lines = [line for group in groups for line in {**group, **moments(group)}.items()]
    heads = next((list(found) for _, found in lines if found), [])
    widths = {head: max(len(head), 10) + 2 for head in heads}
    width = max(len(name) for name, _ in lines)
    return "\n".join([
        " " * width + "".join(f"{head:>{widths[head]}}" for head in heads),
        *(f"{name:{width}}" + _cells(found, widths) for name, found in lines),
    ])  # fmt: skip


def _cells(found: dict[str, float] | None, widths: dict[str, int]) -> str:
    return "".join(f"{found[head]:{width}.2%}" for head, width in widths.items()) if found else f"{'diverged':>12}"
