"""``jaxnets train``: trains, evaluates, draws."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.checkpoint import alone_in
from jaxnets.cli import Train
from jaxnets.commands.objectives import step_of
from jaxnets.commands.reports import (
    Kept,
    accuracies,
    finish,
    grouped,
    look,
    look_at_all,
    members_table,
    moments,
)
from jaxnets.commands.run import Run, build, claim, load, rows_of, total_steps, write_json
from jaxnets.commands.settings import TRAITS, Settled, check_taken, members, settle
from jaxnets.fit import fit
from jaxnets.sweeps import member, stack, sweep, write_members
from jaxnets.training import Step, TrainState
from jaxnets.types import LogitsFn


def train(command: Train) -> None:
    """Trains, evaluates, draws; all of it into the run's folder, or into one for each network."""
    check_taken(command)
    command = settle(command)
    (_train_several if command.is_several else _train_one)(command)


def _train_one(command: Settled) -> None:
    dataset, held_out = rows_of(command)
    run = build(command, dataset, held_out)
    step = _step(command, run, _sources(command, run))
    folder = command.out or Path("runs") / f"{_name(command)}-seed{command.seed}"
    with alone_in(folder):
        claim(folder, command)
        print(f"{folder}: {_describe(command, run)}", flush=True)
        state = _fit(command, folder, run, step, run.state, partial(look, command, run))
        kept = finish(folder, command, run, state)
    _check_kept(kept)
    for name, (number, report) in kept.items():
        which = f", {name} (step {number})" if len(kept) > 1 else ""
        print(f"accuracy on {len(run.y)} test rows, {command.threat} {command.epsilon:g}{which}:\n{report}")
    print(f"pictures: {folder}/curves.png, robustness.png, gallery.png")


def _train_several(command: Settled) -> None:
    """Trains in a hidden folder, so that all that is seen in the other are runs."""
    dataset, held_out = rows_of(command)
    commands = members(command)
    runs = {name: build(one, dataset, held_out) for name, one in commands.items()}
    folder = command.out or Path("runs") / _name(command)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} is the run of one network: choose another --out")
    first = next(iter(runs.values()))
    steps = _steps(command, first)
    together, kept = folder / ".together", {}
    with contextlib.ExitStack() as held:
        for place, one in ((together, command), *((folder / name, one) for name, one in commands.items())):
            held.enter_context(alone_in(place))
            claim(place, one)
        print(f"{folder}: {len(runs)} networks, {', '.join(runs)}; each {_describe(command, first)}", flush=True)
        state = stack([run.state for run in runs.values()])
        states = _fit(command, together, first, steps, state, partial(look_at_all, command, list(runs.values())))
        write_members(together, states, [folder / name for name in runs])
        for number, (name, run) in enumerate(runs.items()):
            kept[name] = finish(folder / name, commands[name], run, member(states, number))
            print(f"{name} is evaluated", flush=True)
    _check_kept({name: found for name, found in kept.items() if found})
    _tell(command, folder, first, kept)


def _check_kept(kept: dict[str, Any]) -> None:
    if not kept:
        raise FloatingPointError("the weights are no longer finite after the last step: lower the learning rate")


def _tell(command: Settled, folder: Path, run: Run, kept: dict[str, dict[str, Kept]]) -> None:
    """Prints a table of all networks, best and last, and writes it beside their folder."""
    numbers = {}
    for which in ("best", "last") if command.held_out else ("last",):
        groups = grouped(
            {name: accuracies(found[which].report) if which in found else None for name, found in kept.items()}
        )
        said = f", {which}" if command.held_out else ""
        print(f"accuracy on {len(run.y)} test rows, {command.threat}{said}:\n{members_table(groups)}")
        numbers[which] = [{"networks": group, **moments(group)} for group in groups]
    path = folder.parent / f"{folder.resolve().name}.json"
    write_json(path, numbers)
    print(f"runs: {folder}/*; numbers: {path}")


def _fit(
    command: Settled,
    folder: Path,
    run: Run,
    step: Step,
    state: TrainState,
    evaluate: Callable[[TrainState], dict[str, Any]],
) -> TrainState:
    return fit(
        step,
        state,
        run.dataset.train,
        folder=folder,
        epochs=command.epochs,
        batch_size=command.batch_size,
        evaluate=evaluate,
        evaluate_every=command.evaluate_every,
        score=(lambda values: values["held-out robust"]) if command.held_out else None,
        patience=command.patience,
    )


def _sources(command: Settled, run: Run) -> list[LogitsFn]:
    models = []
    for folder in command.sources:
        other, model = load(folder, examples=1, data_dir=command.data_dir)
        if (other.x.shape[1:], other.dataset.classes) != (run.x.shape[1:], run.dataset.classes):
            raise ValueError(f"--sources {folder} was trained on {other.dataset.name}, not on {command.data}")
        models.append(model)
    return models


def _step(command: Settled, run: Run, sources: list[LogitsFn]) -> Step:
    dataset = run.dataset
    side, steps = min(run.x.shape[1:3]), total_steps(command, dataset)
    return step_of(command, run.net, classes=len(dataset.classes), side=side, steps=steps, sources=sources)


def _steps(command: Settled, run: Run) -> Step:
    """The step of all networks: what is swept is traced."""
    swept, sources = command.sweep, _sources(command, run)
    if swept is None:
        return sweep(lambda _: _step(command, run, sources), ())
    values = jnp.array([getattr(one, swept) for one in members(command).values()])
    return sweep(lambda value: _step(replace(command, **{swept: value}), run, sources), values)


def _name(command: Settled) -> str:
    epsilon = "" if command.sweep == "epsilon" else f"{command.epsilon:g}"
    swept = f"-{command.sweep}" if command.sweep else ""
    return f"{command.data}-{command.model}-{command.objective}-{command.threat}{epsilon}{swept}"


def _describe(command: Settled, run: Run) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    rows = f"{len(run.dataset.train.labels)} rows of {command.data}"
    return (
        f"{command.model} ({count} parameters), {command.objective}{_against(command, run)}, {rows}, "
        f"{len(jax.devices())} {jax.default_backend()} device(s)"
    )


def _against(command: Settled, run: Run) -> str:
    traits = TRAITS[command.objective]
    if not traits.in_a_threat:
        return ""
    threat = type(run.threat).__name__ if command.sweep == "epsilon" else run.threat
    return f" against {command.attack} in {threat}" if traits.attacks else f" in {threat}"
