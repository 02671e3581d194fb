"""Architectures from 1998 to 2015 under one and the same adversarial training on CIFAR-10.

Claim (after Madry et al. 2017, https://arxiv.org/abs/1706.06083, section 4): capacity helps against an attacker, and
so do later architectures.

Command: ``python -m experiments.cifar10_architectures`` for narrow networks on a CPU; ``--form full --epochs 30
--training-rows 50000`` for wide ones on a GPU (not run). Every network is trained with FGSM from a random start
(epsilon 8/255, step 10/255), AdamW and a triangular rate, and attacked by PGD-20 on the first 1,000 test images;
accuracies are of the last epoch. Picture: docs/architectures.png.
Hardware: two CPU cores that other work shared, which the minutes show; 22 minutes of training. Rebuilt CIFAR-10, 10,000
training rows, 4 epochs, seed 0::

    network          parameters    clean   PGD-20  minutes
    LeNet-5, ReLU        62,006    20.9%    13.8%      0.7
    AlexNet             794,894    36.9%    19.1%      4.3
    VGG-11, BN          336,890    33.2%    14.6%      0.8
    GoogLeNet, BN        54,480    38.4%     4.9%     13.3
    ResNet-18           176,402    29.5%    16.0%      2.6

400 steps are too few to speak for the claim: the largest network is the most robust, and beyond that the order is not
that of the years. GoogLeNet learnt the one step and not the attack (one seed; catastrophic overfitting or bad luck).
With dropout AlexNet ended at 27.9 / 13.2 and VGG learnt nothing, so the narrow forms have none.
Published: one-step training of a PreActResNet-18 of full width on all rows ends at 79.5 / 45 (PGD-50x10); PGD
training of a WRN-32-10 at 87.1 / 47.0 (PGD-20).
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import jaxnets as jn
from experiments import recorded
from jaxnets import attacks, models

THREAT = jn.Linf(8 / 255)

FORMS: dict[str, dict[str, Callable[[], Any]]] = {
    "narrow": {
        "LeNet-5, ReLU": models.LeNet5.modern,
        "AlexNet": partial(models.AlexNet.small, width=16, dropout=0.0),
        "VGG-11, BN": partial(models.vgg11_bn, 10, width=12, hidden=64, places=1, dropout=0.0),
        "GoogLeNet, BN": partial(models.GoogLeNet.small, width=1 / 10),
        "ResNet-18": partial(models.resnet18, 10, width=8, stem=models.cifar_stem),
    },
    "full": {
        "LeNet-5, ReLU": models.LeNet5.modern,
        "AlexNet": models.AlexNet.small,
        "VGG-16, BN": partial(models.vgg16_bn, 10, hidden=512, places=1),
        "GoogLeNet, BN": models.GoogLeNet.small,
        "ResNet-18": partial(models.resnet18, 10, stem=models.cifar_stem),
    },
}


@dataclass(frozen=True)
class Settings:
    """The same training for every architecture."""

    form: Literal["narrow", "full"] = "narrow"
    """Widths that two cores bear, or the published ones."""
    seeds: tuple[int, ...] = (0,)
    epochs: int = 4
    training_rows: int = 10_000
    """Rows trained on, from the first on."""
    rows: int = 1000
    """Test images that are attacked, from the first on."""
    batch_size: int = 100
    peak: float = 2e-3
    """The highest learning rate of the triangle."""
    data_dir: Path | None = None
    out: Path = Path("runs/cifar10_architectures")
    smoke: bool = False
    """Try the script in a minute, on scikit-learn's digits and the first network."""


def main(settings: Settings) -> dict[str, list[dict[str, float]]]:
    """Trains and attacks every network; a line each, then a picture. Finished ones are not run again."""
    networks = FORMS[settings.form]
    if settings.smoke:
        settings = dataclasses.replace(settings, epochs=1, rows=50, training_rows=500)
        networks = {"MLP": lambda: models.MLP((32,))}
    data = jn.data.load("digits" if settings.smoke else "cifar10", settings.data_dir)
    found: dict[str, list[dict[str, float]]] = {}
    print(f"{'network':18}{'parameters':>12}{'clean':>9}{'PGD-20':>9}{'minutes':>9}")
    for name, make in networks.items():
        found[name] = [finished(settings, name, make, data, seed) for seed in settings.seeds]
        print(line(name, found[name]), flush=True)
    draw(settings.out / "architectures.png", found)
    print(f"picture: {settings.out}/architectures.png")
    return found


def finished(settings: Settings, name: str, make: Callable, data: jn.data.Dataset, seed: int) -> dict[str, float]:
    """The result of one network, run unless its record is there."""
    recipe = f"{settings.training_rows}-{settings.epochs}-{settings.batch_size}-{settings.peak:g}"
    folder = settings.out / f"{data.name}-{settings.form}-{recipe}" / f"{name.split(',')[0].lower()}-{seed}"
    record = folder / f"result-{settings.rows}.json"
    return recorded(record, partial(run, settings, make, data, seed, folder))


def run(settings: Settings, make: Callable, data: jn.data.Dataset, seed: int, folder: Path) -> dict[str, float]:
    init_key, train_key, attack_key = jax.random.split(jax.random.key(seed), 3)
    net, train = jn.from_linen(make()), jn.data.Split(*(part[: settings.training_rows] for part in data.train))
    x, y = jn.data.to_float(data.test.images[: settings.rows]), data.test.labels[: settings.rows]
    params, stats = net.init(init_key, x[:1])
    steps = settings.epochs * jn.data.steps_per_epoch(len(train.labels), settings.batch_size)
    rate = jn.optimizers.triangular(settings.peak, steps)
    optimizer = optax.adamw(rate, weight_decay=1e-4)
    objective = jn.objectives.adversarial(
        net, partial(attacks.fgsm, threat=THREAT, step_size=10 / 255, start=attacks.uniform)
    )
    state = jn.training.init_state(train_key, params, stats, optimizer)
    began = time.monotonic()
    step = jn.training.make_step(objective, optimizer)
    state = jn.fit.fit(step, state, train, folder=folder, epochs=settings.epochs, batch_size=settings.batch_size)
    minutes = (time.monotonic() - began) / 60
    pgd = partial(attacks.pgd, threat=THREAT, steps=20, step_size=2 / 255)
    model = net.logits_fn(state.params, state.stats)
    accuracy = jn.evaluation.evaluate(attack_key, model, x, y, {"pgd": pgd}, threat=THREAT).accuracies()
    trained = {name: part for name, part in params.items() if not name.startswith("aux")}  # GoogLeNet's heads are not
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    return {"parameters": size, "clean": accuracy["clean"], "robust": accuracy["pgd"], "minutes": minutes}


def line(name: str, results: list[dict[str, float]]) -> str:
    mean = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
    accuracies = f"{mean['clean']:9.1%}{mean['robust']:9.1%}"
    return f"{name:18}{int(mean['parameters']):12,}{accuracies}{mean['minutes']:9.1f}"


def draw(path: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Clean and robust accuracy of every network, a bar each, with its parameters below."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(found))
    for shift, key, label in ((-0.2, "clean", "clean"), (0.2, "robust", "PGD-20, 8/255")):
        values = [[result[key] for result in results] for results in found.values()]
        axes.bar(
            places + shift, [np.mean(one) for one in values], 0.4, yerr=[np.std(one) for one in values], label=label
        )
    sizes = [results[0]["parameters"] for results in found.values()]
    axes.set_xticks(places, [f"{name}\n{size:,.0f}" for name, size in zip(found, sizes, strict=True)])
    axes.set(ylabel="accuracy", title="one training, five architectures (parameters below)")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Settings))
