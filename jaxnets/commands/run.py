"""A run: its configuration turned into a network, data and an optimizer, and its folder written and read.

Nothing here knows an attack, so that `verify` can use it.
"""

import dataclasses
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import data
from jaxnets.checkpoint import CheckpointError, Checkpoints
from jaxnets.classifier import Classifier, from_linen
from jaxnets.cli import Train
from jaxnets.commands import networks
from jaxnets.optimizers import triangular
from jaxnets.threats import L1, L2, Linf, Threat
from jaxnets.training import TrainState, init_state

EXPECTED = (ValueError, OSError, CheckpointError, FloatingPointError)
"""What bad input raises; anything else is a fault of ours and keeps its traceback."""

THREATS: dict[str, Callable[[float], Threat]] = {"linf": Linf, "l2": L2, "l1": L1}
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
    attack_key: jax.Array
    x: np.ndarray
    y: np.ndarray


def settle(command: Train) -> Settled:
    """What depends on the data, filled in: few small images bear many passes and a high rate."""
    epochs, learning_rate = (100, 1e-2) if command.data == "digits" else (10, 1e-3)
    given = {name: value for name, value in dataclasses.asdict(command).items() if value is not None}
    return Settled(**{"epochs": epochs, "learning_rate": learning_rate, **given})


def build(command: Settled) -> Run:
    dataset = data.load(command.data, command.data_dir)
    net = from_linen(networks.module(command.model, len(dataset.classes), dataset.test.images.shape[1:]))
    init_key, train_key, attack_key = jax.random.split(jax.random.key(command.seed), 3)
    x = data.to_float(dataset.test.images[: command.examples])
    params, stats = net.init(init_key, jnp.asarray(x[:1]))
    steps = command.epochs * data.steps_per_epoch(len(dataset.train.labels), command.batch_size)
    rate = SCHEDULES[command.schedule](command.learning_rate, steps)
    optimizer = OPTIMIZERS[command.optimizer](rate, command.weight_decay)
    state = init_state(train_key, params, stats, optimizer)
    threat = THREATS[command.threat](command.epsilon)
    return Run(net, threat, dataset, state, optimizer, attack_key, x, dataset.test.labels[: command.examples])


def load(
    folder: Path,
    *,
    examples: int,
    threat: str | None = None,
    epsilon: float | None = None,
    data_dir: Path | None = None,
) -> tuple[Run, Any]:
    """A trained run and its model, in its own threat unless another is given."""
    saved = folder / "config.json"
    if not saved.exists():
        raise ValueError(f"{folder} is no run: it has no config.json. A run is a folder written by jaxnets train")
    try:
        values = json.loads(saved.read_text())["config"]
        trained = settle(Train(**{name: value for name, value in values.items() if name not in ("data_dir", "out")}))
        check_train(trained)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{saved} is damaged or of another version ({error}): train the run again") from error
    if threat not in (None, trained.threat) and epsilon is None:
        raise ValueError(f"{folder} was trained in {trained.threat}: say --epsilon for {threat}")
    changes: dict[str, Any] = {
        "threat": threat or trained.threat,
        "epsilon": trained.epsilon if epsilon is None else epsilon,
        "data_dir": data_dir or (Path(values["data_dir"]) if values.get("data_dir") else None),
    }
    run = build(dataclasses.replace(trained, examples=examples, **changes))
    state = Checkpoints(folder / "checkpoints").restore(run.state)
    if state is None:
        raise ValueError(f"{folder} has no checkpoint yet: let its training reach one")
    return run, run.net.logits_fn(*jax.tree.map(jnp.asarray, (state.params, state.stats)))


def claim(folder: Path, command: Settled) -> None:
    """Writes the configuration into a new folder, or checks that the folder is of the same run."""
    config = json.loads(json.dumps(dataclasses.asdict(command), default=str))
    saved = folder / "config.json"
    if not saved.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(saved, {"config": config, "versions": versions()})
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


def check_train(command: Settled) -> None:
    check_at_least(command, epsilon=0, steps=1, epochs=1, batch_size=1, weight_decay=0, evaluate_every=1, examples=1)
    if not command.learning_rate > 0:
        raise ValueError(f"--learning-rate must be above 0, got {command.learning_rate}")
    if not 0 <= command.label_smoothing < 1:
        raise ValueError(f"--label-smoothing must be at least 0 and below 1, got {command.label_smoothing}")
    if not 0 <= command.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {command.seed}")


def check_at_least(command: Any, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(command, name)
        if not bound <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be a number from {bound} on, got {value}")


def versions() -> dict[str, str]:
    packages = ("jaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.replace(path)
