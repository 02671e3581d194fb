"""A run: its configuration turned into a network, data and an optimizer, and its folder written and read.

Nothing here knows an attack, so that `verify` can use it.
"""

import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets import data
from jaxnets.averaging import init_average
from jaxnets.checkpoint import BusyError, CheckpointError, Checkpoints
from jaxnets.classifier import Classifier, from_linen
from jaxnets.cli import Train
from jaxnets.commands import networks
from jaxnets.commands.settings import Settled, settle
from jaxnets.fit import restore_best
from jaxnets.optimizers import triangular
from jaxnets.threats import L1, L2, Linf, Threat
from jaxnets.training import TrainState, init_state

EXPECTED = (ValueError, OSError, CheckpointError, BusyError, FloatingPointError)
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


class Run(NamedTuple):
    """What a configuration stands for.

    Attributes:
      net, threat: by their names.
      dataset: the training rows without those held out.
      state: before the first step.
      attack_key: of every attack in evaluations.
      x, y: the test rows that evaluation attacks.
      watched: the rows and classes that are looked at during training.
    """

    net: Classifier
    threat: Threat
    dataset: data.Dataset
    state: TrainState
    attack_key: jax.Array
    x: np.ndarray
    y: np.ndarray
    watched: tuple[np.ndarray, np.ndarray]


@lru_cache(maxsize=1)
def _dataset(name: str, data_dir: Path | None) -> data.Dataset:
    """Read once for runs that follow each other."""
    return data.load(name, data_dir)


def rows_of(command: Settled) -> tuple[data.Dataset, data.Split | None]:
    """The data without the rows that are held out, the same for every seed, and those rows."""
    dataset = _dataset(command.data, command.data_dir)
    if not command.held_out:
        return dataset, None
    rest, held_out = data.hold_out(dataset.train, command.held_out, key=jax.random.key(0))
    return dataset._replace(train=rest), held_out


def build(command: Settled, dataset: data.Dataset, held_out: data.Split | None = None) -> Run:
    net = from_linen(networks.module(command.model, len(dataset.classes), dataset.test.images.shape[1:]))
    init_key, train_key, attack_key = jax.random.split(jax.random.key(command.seed), 3)
    x, y = data.to_float(dataset.test.images[: command.examples]), dataset.test.labels[: command.examples]
    params, stats = net.init(init_key, jnp.asarray(x[:1]))
    state = init_state(train_key, params, stats, optimizer_of(command, total_steps(command, dataset)))
    if command.ema is not None:
        state = init_average(state)
    if command.objective == "free":
        state = state._replace(perturbation=jnp.zeros((command.batch_size, *x.shape[1:])))
    watched = (data.to_float(held_out.images), held_out.labels) if held_out else (x[:500], y[:500])
    return Run(net, THREATS[command.threat](command.epsilon), dataset, state, attack_key, x, y, watched)


def total_steps(command: Settled, dataset: data.Dataset) -> int:
    """Of the whole training."""
    return command.epochs * data.steps_per_epoch(len(dataset.train.labels), command.batch_size)


def optimizer_of(command: Settled, steps: int) -> optax.GradientTransformation:
    """The optimizer of a training of so many steps; the learning rate may be traced."""
    rate = SCHEDULES[command.schedule](command.learning_rate, steps * command.replays)
    return OPTIMIZERS[command.optimizer](rate, command.weight_decay)


def model_of(net: Classifier, state: TrainState) -> Any:
    """The network of a state: of its averaged weights where it keeps an average."""
    params, stats = (state.params, state.stats) if state.averaged is None else state.averaged
    return net.logits_fn(*jax.tree.map(jnp.asarray, (params, stats)))


def load(
    folder: Path,
    *,
    examples: int,
    threat: str | None = None,
    epsilon: float | None = None,
    data_dir: Path | None = None,
    last: bool = False,
) -> tuple[Run, Any]:
    """A trained run and its model, in its own threat unless another is given.

    The model is the best on the rows held out, where there are any, unless the ``last`` is asked for.
    """
    saved = folder / "config.json"
    if not saved.exists():
        raise ValueError(f"{folder} is no run: it has no config.json. A run is a folder written by jaxnets train")
    try:
        values = json.loads(saved.read_text())["config"]
        if values.get("sweep") or values.get("seeds", 1) > 1:
            raise ValueError(f"{folder} is of several networks: name the folders of their runs, beside it")
        trained = settle(Train(**{name: value for name, value in values.items() if name not in ("data_dir", "out")}))
        data_dir = data_dir or (Path(values["data_dir"]) if values.get("data_dir") else None)
        for table, name in ((THREATS, trained.threat), (OPTIMIZERS, trained.optimizer), (SCHEDULES, trained.schedule)):
            table[name]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{saved} is damaged or of another version ({error}): train the run again") from error
    if threat not in (None, trained.threat) and epsilon is None:
        raise ValueError(f"{folder} was trained in {trained.threat}: say --epsilon for {threat}")
    changes: dict[str, Any] = {
        "threat": threat or trained.threat,
        "epsilon": trained.epsilon if epsilon is None else epsilon,
        "data_dir": data_dir,
    }
    trained = dataclasses.replace(trained, examples=examples, **changes)
    run = build(trained, _dataset(trained.data, trained.data_dir))
    best = None if last else restore_best(folder, run.state)
    state = best[0] if best else Checkpoints(folder / "checkpoints").restore(run.state)
    if state is None:
        raise ValueError(f"{folder} has no checkpoint yet: let its training reach one")
    if not is_finite(state):
        raise ValueError(f"the network of {folder} has diverged: its weights are no longer finite")
    return run, model_of(run.net, state)


def is_finite(state: TrainState) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def warn_of_unfinished(folder: Path) -> None:
    if not (folder / "report.json").exists():
        print(f"jaxnets: {folder} has not ended its training: this is its last checkpoint", file=sys.stderr)


def claim(folder: Path, command: Settled) -> None:
    """Writes the configuration into a folder, or checks that what has been trained there is the same run."""
    # For those who load the run from elsewhere; after an equals sign no shell has expanded it.
    data_dir = command.data_dir and command.data_dir.expanduser().absolute()
    config = _as_json(dataclasses.replace(command, data_dir=data_dir))
    saved = folder / "config.json"
    trained = (folder / "report.json").exists() or any((folder / "checkpoints").glob("[0-9]*"))
    if trained and not saved.exists():
        raise ValueError(f"{folder} holds a training without its config.json: choose another --out, or delete it")
    try:
        # What a version before did not ask was as it is by itself.
        before = _as_json(Train()) | _claimed(saved)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{saved} is damaged or of something else ({error!r}): choose another --out, or delete {folder}"
        ) from error
    if not trained:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(saved, {"config": config, "versions": versions()})
        return
    free = {"data_dir", "out"}  # the same run may be continued from elsewhere
    changed = [name for name in config if name not in free and config[name] != before[name]]
    if changed:
        said = ", ".join(f"{name} was {before[name]} and is {config[name]}" for name in changed)
        raise ValueError(f"{folder} holds another run ({said}): choose another --out, or delete it")


def _claimed(saved: Path) -> dict[str, Any]:
    if not saved.exists():
        return {}
    config = json.loads(saved.read_text())["config"]
    config["objective"]  # which no other program's config.json has, nor that of an exported network
    return config


def _as_json(command: Train) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(command), default=str))


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
