"""``jaxnets export``: the trained network of a run as a folder that can be published."""

import dataclasses
import json

import jax

from jaxnets import weights
from jaxnets.cli import Export, Train
from jaxnets.commands.run import load, warn_of_unfinished
from jaxnets.weights.folders import check_unused


def export(command: Export) -> None:
    """Writes weights and configuration where `jaxnets.weights.load` reads them; a folder that is in use is refused."""
    check_unused(command.folder)
    run, model = load(command.run, examples=1, data_dir=command.data_dir)
    params, stats = model.args
    weights.save(command.folder, params, stats, _config(command, len(run.dataset.classes), run.x.shape[1:]))
    warn_of_unfinished(command.run)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = sum(file.stat().st_size for file in command.folder.iterdir())
    print(f"written: {command.folder}/model.safetensors, config.json: {count:,} parameters, {size:,} bytes")


def _config(command: Export, classes: int, image: tuple[int, ...]) -> dict[str, object]:
    """What builds the network again, and how it was trained; folders are of no use elsewhere."""
    said = dataclasses.asdict(Train()) | json.loads((command.run / "config.json").read_text())["config"]
    training = {name: value for name, value in said.items() if name not in ("data_dir", "out")}
    return {"model": training["model"], "classes": classes, "image": list(image), "training": training}
