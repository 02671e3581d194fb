"""Pictures of a run: curves of training, accuracy against epsilon, and a gallery of adversarial examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def training_curves(path: Path, metrics: Sequence[Mapping[str, Any]], *, steps_per_epoch: int) -> None:
    """Loss, and accuracies in training and evaluation, against epochs.

    Args:
      path: of the PNG.
      metrics: rows of ``metrics.jsonl``: those with a ``loss`` are steps, the others evaluations.
      steps_per_epoch: what an epoch is.
    """
    steps = [row for row in metrics if "loss" in row]
    evaluations = [row for row in metrics if "loss" not in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = np.array([row["step"] for row in steps]) / steps_per_epoch
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        values = np.array([row.get(name, np.nan) for row in steps])
        axes.plot(epochs, values, color="tab:gray", alpha=0.3, linewidth=0.8)
        axes.plot(epochs, _smoothed(values, steps_per_epoch // 4), color="black", label=f"training {name}")
        axes.set(xlabel="epoch", ylabel=name)
    for name in evaluations[0].keys() - {"step"} if evaluations else ():
        points = [(row["step"] / steps_per_epoch, row[name]) for row in evaluations if name in row]
        accuracies.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name} accuracy")
    losses.set_yscale("log")
    accuracies.set(ylim=(0, 1.02))
    accuracies.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def accuracy_against_epsilon(path: Path, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, xlabel: str) -> None:
    """Accuracy under attack against the perturbation's size: a line for each of ``{name: (epsilons, accuracies)}``."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (epsilons, accuracies) in curves.items():
        axes.plot(epsilons, accuracies, marker="o", markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel="accuracy under attack", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def gallery(
    path: Path,
    x: np.ndarray,
    x_adv: np.ndarray,
    predictions: tuple[np.ndarray, np.ndarray],
    classes: Sequence[str],
) -> None:
    """Clean image, perturbation (grey is zero) and adversarial image, a column a row, with both predictions.

    Args:
      path: of the PNG.
      x, x_adv: ``[N, H, W, C]`` in ``[0, 1]``, one or three channels.
      predictions: classes ``[N]`` of the clean and of the adversarial images.
      classes: their names.
    """
    figure = Figure(figsize=(1.3 * len(x) + 0.5, 4.6), layout="constrained")
    grid = figure.subplots(3, len(x), squeeze=False)
    perturbation = x_adv - x
    largest = max(float(np.abs(perturbation).max()), 1e-9)
    for label, images, axes_row in (
        ("clean", x, grid[0]),
        (f"perturbation\n(up to {largest:.2g})", 0.5 + 0.5 * perturbation / largest, grid[1]),
        ("adversarial", x_adv, grid[2]),
    ):
        images = images[..., 0] if images.shape[-1] == 1 else images
        for image, axes in zip(images, axes_row, strict=True):
            axes.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(label)
    for row, named in ((0, predictions[0]), (2, predictions[1])):
        for axes, before, now in zip(grid[row], predictions[0], named, strict=True):
            axes.set_title(classes[int(now)], fontsize=10, color="black" if now == before else "tab:red")
    figure.savefig(path, dpi=120)


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over the last ``window`` values, over fewer at the beginning."""
    window = max(1, min(window, len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
