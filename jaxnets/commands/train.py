"""``jaxnets train``: trains, evaluates, draws."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import attacks, data, losses, objectives, plots
from jaxnets.cli import Train
from jaxnets.commands.evaluate import as_json, pgd_curve
from jaxnets.commands.run import Run, Settled, build, check_train, claim, settle, write_json
from jaxnets.evaluation import Report
from jaxnets.evaluation import evaluate as evaluate_attacks
from jaxnets.fit import fit, read_metrics
from jaxnets.threats import Threat
from jaxnets.training import TrainState
from jaxnets.types import Array, Attack, Loss

STARTS = {
    "uniform": attacks.uniform,
    "uniform_unclipped": attacks.uniform_unclipped,
    "at_clean": attacks.at_clean,
}
ATTACKS: dict[str, Callable[[Train, Threat], Attack]] = {
    "pgd": lambda c, threat: partial(attacks.pgd, threat=threat, steps=c.steps, start=STARTS[c.start]),
    "fgsm": lambda c, threat: partial(
        attacks.fgsm, threat=threat, step_size=1.25 * threat.epsilon, start=STARTS[c.start]
    ),
}
OBJECTIVES: dict[str, Callable[..., Any]] = {
    "adversarial": lambda net, attack, loss: objectives.adversarial(net, attack, loss=loss),
    "standard": lambda net, attack, loss: objectives.standard(net, loss=loss),
}


def train(command: Train) -> None:
    """Trains, evaluates, draws; all of it into the run's folder."""
    command = settle(command)
    check_train(command)
    run = build(command)
    folder = command.out or Path("runs") / (
        f"{command.data}-{command.model}-{command.objective}-{command.threat}{command.epsilon:g}-seed{command.seed}"
    )
    claim(folder, command)
    print(f"{folder}: {_describe(command, run)}", flush=True)
    loss = _smoothed(command.label_smoothing, len(run.dataset.classes))
    objective = OBJECTIVES[command.objective](run.net, ATTACKS[command.attack](command, run.threat), loss)
    state = fit(
        objective,
        run.optimizer,
        run.state,
        run.dataset.train,
        folder=folder,
        epochs=command.epochs,
        batch_size=command.batch_size,
        evaluate=partial(_look, run),
        evaluate_every=command.evaluate_every,
    )
    pgd = partial(attacks.pgd, threat=run.threat, steps=40)
    suite: dict[str, Attack] = {
        "fgsm": partial(attacks.fgsm, threat=run.threat),
        "pgd-40": pgd,
        "pgd-40 margin": partial(pgd, loss=losses.margin),
    }
    model = run.net.logits_fn(state.params, state.stats)
    report = evaluate_attacks(run.attack_key, model, run.x, run.y, suite, threat=run.threat)
    print(f"accuracy on {len(run.y)} test rows, {command.threat} {command.epsilon:g}:\n{report}")
    write_json(folder / "report.json", as_json(report))
    _draw(folder, command, run, model, report)
    print(f"pictures: {folder}/curves.png, robustness.png, gallery.png")


def _look(run: Run, state: TrainState) -> dict[str, float]:
    """A quick look at at most 500 test rows while training."""
    attack = partial(attacks.pgd, threat=run.threat, steps=20)
    model = run.net.logits_fn(state.params, state.stats)
    report = evaluate_attacks(run.attack_key, model, run.x[:500], run.y[:500], {"robust": attack}, threat=run.threat)
    return {name: report.accuracies()[name] for name in ("clean", "robust")}


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


def _smoothed(amount: float, classes: int) -> Loss:
    if not amount:
        return losses.cross_entropy

    def loss(logits: Array, target: Array) -> Array:
        return losses.cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(target, classes), amount))

    return loss


def _describe(command: Settled, run: Run) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    against = f" against {command.attack} in {run.threat}" if command.objective == "adversarial" else ""
    rows = f"{len(run.dataset.train.labels)} rows of {command.data}"
    return (
        f"{command.model} ({count} parameters), {command.objective}{against}, {rows}, "
        f"{len(jax.devices())} {jax.default_backend()} device(s)"
    )
