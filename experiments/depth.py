"""How gradients fare on their way through deep networks, and what shortcuts do for them.

Claim (He et al. 2016, https://arxiv.org/abs/1512.03385): without shortcuts networks train worse the deeper they are,
with them they do not.

Command: ``python -m experiments.depth``: on the first 64 training images of (rebuilt) CIFAR-10.
Hardware: two CPU cores that other work shared; 32 minutes, 18 of them for the last table. Picture: docs/depth.png.

For every family, narrow, the norm of the gradient in the first layer over that in the last, at initialisation::

    network               seed 0   seed 1   seed 2     network               seed 0   seed 1   seed 2
    Perceptron                 1        1        1     ZFNet                  0.329    0.346     0.35
    MLP                     11.7     8.09     6.95     VGG-16                  1.06     1.57     1.41
    RBFNetwork                 0        0        0     VGG-16, batch norm      4.15     3.44     1.79
    LeNet-5 (1998)          1.36    0.472     1.64     GoogLeNet                1.6     2.03     3.98
    LeNet-5, ReLU           1.27     1.67     0.95     ResNet-18                3.2    0.961     2.45
    SmallCNN               0.871    0.986     0.77     PreActResNet-18         2.11     2.13     1.29
    MadryCNN                0.58    0.733    0.752     WRN-16-1               0.368    0.381    0.537
    AlexNet                0.273    0.366    0.399     ViT                    0.771     1.51     1.08

A perceptron has one layer. Sums of radial basis functions start at zero: the centres move from the second step on.

For plain and residual networks of half the published width, seed 0, and the mean loss of the last 10 of 150 steps of
Adam::

    layers         20                   56                    110
    plain          10.4     0.046       1,630     1.015       14,500,000     2.200
    residual       0.41     0.006       0.414     0.000             1.38     0.000

So the gradients of no other family vanish. Under batch norm those of plain networks explode towards the first layer,
more than ten times for every 20 layers, and with 110 layers nothing is learnt; shortcuts keep them level, and depth
helps.
Published: on all of CIFAR-10 plain networks of 56 layers end at a higher training error than those of 20, and one of
110 layers stays above 60% (figure 6 of the paper); residual ones end lower the deeper they are.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxnets as jn
from jaxnets import models
from jaxnets.types import Batch

FAMILIES: dict[str, Callable[[], Any]] = {
    "Perceptron": models.Perceptron,
    "MLP": partial(models.MLP, (64, 64, 64)),
    "RBFNetwork": models.RBFNetwork,
    "LeNet-5 (1998)": models.LeNet5,
    "LeNet-5, ReLU": models.LeNet5.modern,
    "SmallCNN": models.SmallCNN,
    "MadryCNN": models.MadryCNN,
    "AlexNet": partial(models.AlexNet.small, width=16),
    "ZFNet": partial(models.ZFNet.small, width=16),
    "VGG-16": partial(models.vgg16, 10, width=8, hidden=64, places=1),
    "VGG-16, batch norm": partial(models.vgg16_bn, 10, width=8, hidden=64, places=1),
    "GoogLeNet": partial(models.GoogLeNet.small, width=1 / 16),
    "ResNet-18": partial(models.resnet18, 10, width=8, stem=models.cifar_stem),
    "PreActResNet-18": partial(models.preact_resnet18, width=8),
    "WRN-16-1": partial(models.WideResNet, 16, 1),
    "ViT": partial(models.ViT, patch=4, width=48, depth=6, heads=3, classes=10),
}
SHORTCUTS = {"plain": models.resnet.NoShortcut, "residual": models.resnet.Padded}


@dataclass(frozen=True)
class Settings:
    """Gradients at initialisation, and the first steps of training."""

    layers: tuple[int, ...] = (20, 56, 110)
    width: int = 8
    """Features of the first stage of plain and residual networks; 16 as published."""
    steps: int = 150
    """Of Adam on the 64 images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the initial weights for the ratios; training takes the first."""
    data_dir: Path | None = None
    out: Path = Path("runs/depth")
    smoke: bool = False
    """Try the script in a minute: digits, two families, 8 layers."""


def main(settings: Settings) -> dict[str, Any]:
    """Prints both tables and draws the picture."""
    families = FAMILIES
    if settings.smoke:
        settings = dataclasses.replace(settings, layers=(8,), width=4, steps=3, seeds=(0,))
        families = {
            "MLP": FAMILIES["MLP"],
            "ResNet": partial(models.ResNet, (1,), models.resnet.BasicBlock, 10, 4, models.cifar_stem),
        }
    train = jn.data.load("digits" if settings.smoke else "cifar10", settings.data_dir).train
    batch = Batch(jn.data.to_float(train.images[:64]), train.labels[:64])
    print(f"{'network':22}{'first / last layer, seeds ' + str(settings.seeds)}")
    ratios = {}
    for name, make in families.items():
        ratios[name] = [ratio(norms_of(make(), batch, seed)) for seed in settings.seeds]
        print(f"{name:22}" + "".join(f"{value:9.3g}" for value in ratios[name]), flush=True)
    print(f"{'network':22}{'first / last layer':>20}{'loss after ' + str(settings.steps):>18}")
    deep = {}
    for layers in settings.layers:
        for kind, shortcut in SHORTCUTS.items():
            module = models.cifar_resnet(layers, width=settings.width, shortcut=shortcut)
            norms, losses = norms_of(module, batch, settings.seeds[0]), train_on(module, batch, settings)
            deep[kind, layers] = norms, losses
            print(f"{f'{kind}, {layers}':22}{ratio(norms):20.3g}{np.mean(losses[-10:]):18.3f}", flush=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    draw(settings.out / "depth.png", deep)
    print(f"picture: {settings.out}/depth.png")
    return {"ratios": ratios, "deep": deep}


def norms_of(module: Any, batch: Batch, seed: int) -> np.ndarray:
    """Of the gradient in each layer on the main path, at initialisation."""
    net, key = jn.from_linen(module), jax.random.key(seed)
    params, stats = jax.jit(net.init)(key, batch.x[:1])
    norms = jn.diagnostics.gradient_norms(net, jn.objectives.standard(net), params, stats, batch, key)
    beside = {"aux1", "aux2", "downsample", "shortcut"}
    return np.array([norm for name, norm in norms.items() if beside.isdisjoint(name.split("/"))])


def ratio(norms: np.ndarray) -> float:
    return float(norms[0] / norms[-1])


def train_on(module: Any, batch: Batch, settings: Settings) -> list[float]:
    """The loss of each step of training on the one batch."""
    net, optimizer = jn.from_linen(module), optax.adam(1e-3)
    key = jax.random.key(settings.seeds[0])
    state = jn.training.init_state(key, *jax.jit(net.init)(key, batch.x[:1]), optimizer)
    step = jax.jit(jn.training.make_step(jn.objectives.standard(net), optimizer), donate_argnums=0)
    losses = []
    for _ in tqdm(range(settings.steps), leave=False):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def draw(path: Path, deep: dict[tuple[str, int], tuple[np.ndarray, list[float]]]) -> None:
    """Gradient norms against depth, and the loss against steps; plain networks dashed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    gradients, training = figure.subplots(1, 2)
    depths = list(dict.fromkeys(layers for _, layers in deep))
    for (kind, layers), (norms, losses) in deep.items():
        style = {
            "color": f"C{depths.index(layers)}",
            "linestyle": "--" if kind == "plain" else "-",
            "label": f"{kind}, {layers}",
        }
        gradients.plot(np.linspace(0, 1, len(norms)), norms, **style)
        training.plot(np.arange(1, len(losses) + 1), losses, **style)
    gradients.set(xlabel="layer, from first to last", ylabel="norm of the gradient at initialisation", yscale="log")
    training.set(xlabel="step", ylabel="training loss, 64 images", yscale="log")
    training.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Settings))
