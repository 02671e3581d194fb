"""What the command does: names become functions here, and a run's folder is written and read."""

import dataclasses
import json
import platform
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import attacks, data, losses, models, objectives, plots
from jaxnets.checkpoint import CheckpointError, Checkpoints
from jaxnets.classifier import Classifier, from_linen
from jaxnets.cli import Evaluate, Train
from jaxnets.evaluation import Report, robustness_curve, table
from jaxnets.evaluation import evaluate as evaluate_attacks
from jaxnets.fit import fit, read_metrics
from jaxnets.optimizers import triangular
from jaxnets.threats import L1, L2, Linf, Threat
from jaxnets.training import TrainState, init_state
from jaxnets.types import Array, Attack, Loss
from jaxnets.verification import accuracy_interval

EXPECTED = (ValueError, OSError, CheckpointError, FloatingPointError)
"""What bad input raises; anything else is a fault of ours and keeps its traceback."""

MODELS: dict[str, Callable[[int], Any]] = {
    "small_cnn": lambda classes: models.SmallCNN(classes),
    "mlp": lambda classes: models.MLP(classes=classes),
    "lenet5": lambda classes: models.LeNet5(),
    "lenet5_modern": lambda classes: models.LeNet5.modern(classes),
    "madry_cnn": lambda classes: models.MadryCNN(classes),
}
THREATS: dict[str, Callable[[float], Threat]] = {"linf": Linf, "l2": L2, "l1": L1}
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
OPTIMIZERS: dict[str, Callable[[Any, float], optax.GradientTransformation]] = {
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "sgd": lambda rate, decay: optax.chain(
        optax.trace(0.9, nesterov=True), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
    ),
    "lion": lambda rate, decay: optax.lion(rate, weight_decay=decay),
}
SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "cosine": optax.cosine_decay_schedule,
    "triangular": triangular,
    "constant": lambda rate, steps: optax.constant_schedule(rate),
}


@dataclasses.dataclass(frozen=True)
class Settled(Train):
    """A training whose every number is known."""

    epochs: int = 0
    learning_rate: float = 0.0


class Run(NamedTuple):
    """What a configuration stands for. ``x`` and ``y`` are the test rows that evaluation attacks."""

    net: Classifier
    threat: Threat
    dataset: data.Dataset
    state: TrainState
    optimizer: optax.GradientTransformation
    attack_key: Array
    x: np.ndarray
    y: np.ndarray


def train(command: Train) -> None:
    """Trains, evaluates, draws; all of it into the run's folder."""
    command = _settled(command)
    _check_train(command)
    run = _build(command)
    folder = command.out or Path("runs") / (
        f"{command.data}-{command.model}-{command.objective}-{command.threat}{command.epsilon:g}-seed{command.seed}"
    )
    _claim(folder, command)
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
    _write_json(folder / "report.json", _as_json(report))
    _draw(folder, command, run, model, report)
    print(f"pictures: {folder}/curves.png, robustness.png, gallery.png")


def evaluate(command: Evaluate) -> None:
    """Attacks every run and writes one table and one picture."""
    if not command.runs:
        raise ValueError("name at least one run to evaluate: jaxnets evaluate RUN [RUN ...]")
    _check_at_least(command, steps=1, restarts=1, examples=1)
    reports, curves = {}, {}
    for folder in command.runs:
        run, model = _load(folder, command)
        reports[str(folder)] = report = _attack_hard(command, run, model, str(folder))
        curves[str(folder)] = _curve(run, model)
        print(f"{folder} in {run.threat}: worst case {report.accuracies()['worst case']:.2%}", flush=True)
    columns = [report.with_worst_case() for report in reports.values()]
    rows = {name: [(int(column[name].sum()), len(column[name])) for column in columns] for name in columns[0]}
    print(table(rows, list(reports)))
    out = command.out or command.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "evaluation.json", {name: _as_json(report) for name, report in reports.items()})
    plots.accuracy_against_epsilon(out / "evaluation.png", curves, xlabel="epsilon")
    print(f"written: {out}/evaluation.json, evaluation.png")


def _settled(command: Train) -> Settled:
    """What depends on the data, filled in: few small images bear many passes and a high rate."""
    epochs, learning_rate = (100, 1e-2) if command.data == "digits" else (10, 1e-3)
    given = {name: value for name, value in dataclasses.asdict(command).items() if value is not None}
    return Settled(**{"epochs": epochs, "learning_rate": learning_rate, **given})


def _build(command: Settled) -> Run:
    dataset = data.load(command.data, command.data_dir)
    net = from_linen(MODELS[command.model](len(dataset.classes)))
    init_key, train_key, attack_key = jax.random.split(jax.random.key(command.seed), 3)
    x = data.to_float(dataset.test.images[: command.examples])
    params, stats = net.init(init_key, jnp.asarray(x[:1]))
    steps = command.epochs * data.steps_per_epoch(len(dataset.train.labels), command.batch_size)
    rate = SCHEDULES[command.schedule](command.learning_rate, steps)
    optimizer = OPTIMIZERS[command.optimizer](rate, command.weight_decay)
    state = init_state(train_key, params, stats, optimizer)
    threat = THREATS[command.threat](command.epsilon)
    return Run(net, threat, dataset, state, optimizer, attack_key, x, dataset.test.labels[: command.examples])


def _look(run: Run, state: TrainState) -> dict[str, float]:
    """A quick look at at most 500 test rows while training."""
    attack = partial(attacks.pgd, threat=run.threat, steps=20)
    model = run.net.logits_fn(state.params, state.stats)
    report = evaluate_attacks(run.attack_key, model, run.x[:500], run.y[:500], {"robust": attack}, threat=run.threat)
    return {name: report.accuracies()[name] for name in ("clean", "robust")}


def _attack_hard(command: Evaluate, run: Run, model: Any, folder: str) -> Report:
    pgd = partial(attacks.pgd, threat=run.threat, steps=command.steps)
    suite = {
        f"pgd-{command.steps}x{command.restarts} {name}": attacks.restarts(partial(pgd, loss=loss), command.restarts)
        for name, loss in (("ce", losses.cross_entropy), ("margin", losses.margin), ("dlr", losses.dlr))
    }
    key = jax.random.key(command.seed)
    return evaluate_attacks(key, model, run.x, run.y, suite, threat=run.threat)


def _load(folder: Path, command: Evaluate) -> tuple[Run, Any]:
    """A trained run and its model."""
    saved = folder / "config.json"
    if not saved.exists():
        raise ValueError(f"{folder} is no run: it has no config.json. A run is a folder written by jaxnets train")
    try:
        values = json.loads(saved.read_text())["config"]
        trained = _settled(Train(**{name: value for name, value in values.items() if name not in ("data_dir", "out")}))
        _check_train(trained)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{saved} is damaged or of another version ({error}): train the run again") from error
    epsilon = trained.epsilon if command.epsilon is None else command.epsilon
    data_dir = command.data_dir or (Path(values["data_dir"]) if values.get("data_dir") else None)
    run = _build(dataclasses.replace(trained, epsilon=epsilon, examples=command.examples, data_dir=data_dir))
    state = Checkpoints(folder / "checkpoints").restore(run.state)
    if state is None:
        raise ValueError(f"{folder} has no checkpoint yet: let its training reach one")
    return run, run.net.logits_fn(*jax.tree.map(jnp.asarray, (state.params, state.stats)))


def _claim(folder: Path, command: Settled) -> None:
    """Writes the configuration into a new folder, or checks that the folder is of the same run."""
    config = json.loads(json.dumps(dataclasses.asdict(command), default=str))
    saved = folder / "config.json"
    if not saved.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(saved, {"config": config, "versions": _versions()})
        return
    try:
        before = json.loads(saved.read_text())["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{saved} is damaged ({error}): delete {folder} or choose another --out") from error
    free = {"data_dir", "out"}  # the same run may be continued from elsewhere
    changed = [name for name in config if name not in free and config[name] != before.get(name)]
    if changed:
        said = ", ".join(f"{name} was {before.get(name)} and is {config[name]}" for name in changed)
        raise ValueError(f"{folder} holds another run ({said}): choose another --out, or delete it")


def _draw(folder: Path, command: Settled, run: Run, model: Any, report: Report) -> None:
    per_epoch = data.steps_per_epoch(len(run.dataset.train.labels), command.batch_size)
    plots.training_curves(
        folder / "curves.png", list(read_metrics(folder / "metrics.jsonl")), steps_per_epoch=per_epoch
    )
    curve = {f"{command.objective}, pgd-20": _curve(run, model)}
    plots.accuracy_against_epsilon(
        folder / "robustness.png", curve, xlabel=f"epsilon ({command.threat}; trained with {command.epsilon:g})"
    )
    # Fooled rows say more than survivors: they come first.
    shown = np.argsort(report.survived["pgd-40"] + 2 * ~report.survived["clean"], kind="stable")[:8]
    x, x_adv = run.x[shown], report.examples["pgd-40"][shown]
    predictions = np.asarray(jnp.argmax(model(x), -1)), np.asarray(jnp.argmax(model(x_adv), -1))
    plots.gallery(folder / "gallery.png", x, x_adv, predictions, run.dataset.classes)


def _curve(run: Run, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of at most 500 test rows under PGD-20 from no perturbation to twice the threat's."""
    epsilons = np.linspace(0, 2 * (run.threat.epsilon or 0.1), 9)
    attack = partial(attacks.pgd, steps=20)
    x, y = run.x[:500], run.y[:500]
    return epsilons, robustness_curve(run.attack_key, model, x, y, attack, threat=run.threat, epsilons=epsilons)


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


def _check_train(command: Settled) -> None:
    _check_at_least(command, epsilon=0, steps=1, epochs=1, batch_size=1, weight_decay=0, evaluate_every=1, examples=1)
    if not command.learning_rate > 0:
        raise ValueError(f"--learning-rate must be above 0, got {command.learning_rate}")
    if not 0 <= command.label_smoothing < 1:
        raise ValueError(f"--label-smoothing must be at least 0 and below 1, got {command.label_smoothing}")
    if not 0 <= command.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {command.seed}")


def _check_at_least(command: Train | Evaluate, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(command, name)
        if not bound <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be a number from {bound} on, got {value}")


def _versions() -> dict[str, str]:
    packages = ("jaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _as_json(report: Report) -> dict[str, Any]:
    def entry(rows: np.ndarray) -> dict[str, Any]:
        correct, total = int(rows.sum()), len(rows)
        return {"accuracy": correct / total, "rows": total, "interval95": accuracy_interval(correct, total)}

    return {name: entry(rows) for name, rows in report.with_worst_case().items()}


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.replace(path)
