"""One-step adversarial training of a small network on MNIST: as robust as the published network with luck alone.

Claim (Wong et al. 2020, https://arxiv.org/abs/2001.03994): FGSM with a random start trains as robust a network as PGD
does, at a fraction of the cost.

Command: ``python -m experiments.mnist_fast`` for three seeds, with ``--rows 1000 --seeds 3 4 5 6 7 8 9`` for the
others; for the ten-seed comparisons ``--rows 1000 --restarts 1 --seeds 0 1 2 3 4 5 6 7 8 9`` with ``--init lecun``,
``--start clipped`` or ``--peak 2e-3``; ``--attack pgd --start clipped --peak 2e-3 --epochs 12 --seeds 0`` for training
against PGD-7.
Hardware: two CPU cores that other work shared while these ran (which the minutes show).

Accuracy in percent under PGD-50 (step 0.01, 10 restarts, epsilon 0.3), weights started as PyTorch does:

| training             | seeds | rows   | clean               | PGD-50x10                         | min: train, attack |
|----------------------|-------|--------|---------------------|-----------------------------------|--------------------|
| FGSM, random start   | 0-2   | 10,000 | 98.27, 98.31, 97.94 | 79.85, 79.95, 78.78               | 1.7-2.1, 6.5-11.1  |
| FGSM, random start   | 3-9   | 1,000  | 97.8-99.0           | 82.5 85.2 11.7 34.9 0.0 85.6 88.7 | 1.2, 0.7           |
| PGD-7, epsilon rises | 0     | 10,000 | 97.53               | 89.05                             | 7.2, 6.5           |
| Published FGSM, one  |       | 10,000 | 98.50               | 88.77                             |                    |

One choice changed at a time (1,000 rows; one restart, a little weaker than ten):

| changed                                  | PGD-50 of seeds 0-9                                 | mean | below 50 |
|------------------------------------------|-----------------------------------------------------|------|----------|
| nothing (from above, 10 restarts)        | 79.9 80.0 78.8 82.5 85.2 11.7 34.9 0.0 85.6 88.7    | 62.7 | 3        |
| LeCun's kernels, zero biases (Flax)      | 87.8 56.4 0.0 58.1 0.0 66.9 89.7 89.5 92.2 0.0      | 54.1 | 3        |
| start clipped to the box                 | 26.8 48.0 1.0 87.2 69.2 1.8 52.3 38.9 0.0 78.6      | 40.4 | 6        |
| peak of the learning rate 0.002 not .005 | 78.6 86.1 48.0 78.2 51.0 1.1 1.4 0.9 83.8 88.2      | 51.7 | 4        |

What separates one run from another is luck before all: under one and the same choice seeds end tens of points apart,
at clean accuracies between 96.5 and 99.0 (but for 92.8 and 87.6), so that a published checkpoint of 88.77, or ours of
92.2, says little of the recipe. Clipping comes next: it doubles the number of runs that fall. Initialisation and rate
move the mean by less than seeds differ.

The attack is as strong as theirs: the published weights score 88.4 on the same 1,000 rows. The step is the same: the
recipe in PyTorch gave 87.0, 85.7 and 82.3 (seeds 0-2, 1,000 rows), and 0.0 with its biases at zero (seed 0); this
training step fed with PyTorch's initial weights, order and noise of seed 0 repeats the loss of its last epoch (0.1303
against 0.1306). With other noise seeds 5 and 7 fall again (0.0 and 27.9): where a run starts decides more than its
noise.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import tyro

import jaxnets as jn
from experiments import recorded
from jaxnets.types import Params

EPSILON = 0.3


def torch_default(key: jax.Array, params: Params) -> Params:
    """Kernels and biases as PyTorch starts them, and the published code: uniform in ``+-1 / sqrt(fan_in)``."""
    drawn = {}
    for number, (name, layer) in enumerate(params.items()):
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        keys = jax.random.split(jax.random.fold_in(key, number))
        drawn[name] = {
            leaf: jax.random.uniform(leaf_key, layer[leaf].shape, minval=-bound, maxval=bound)
            for leaf, leaf_key in zip(("kernel", "bias"), keys, strict=True)
        }
    return drawn


def kernels_and_biases(kernels: Params, biases: Params) -> Params:
    return {name: {"kernel": kernels[name]["kernel"], "bias": biases[name]["bias"]} for name in kernels}


INITIALISERS: dict[str, Callable[[jax.Array, Params], Params]] = {
    "torch": torch_default,
    "torch_kernels": lambda key, params: kernels_and_biases(torch_default(key, params), params),
    "torch_biases": lambda key, params: kernels_and_biases(params, torch_default(key, params)),
    "lecun": lambda key, params: params,
}
STARTS = {"unclipped": jn.attacks.uniform_unclipped, "clipped": jn.attacks.uniform}
ATTACKS: dict[str, Callable[[Callable, float], Callable]] = {
    "fgsm": lambda start, epsilon: partial(
        jn.attacks.fgsm, threat=jn.Linf(epsilon), step_size=1.25 * epsilon, start=start
    ),
    "pgd": lambda start, epsilon: partial(
        jn.attacks.pgd, threat=jn.Linf(epsilon), steps=7, step_size=epsilon / 3, start=start
    ),
}
WARM_UP = {"fgsm": (), "pgd": (0.1, 0.2)}
"""An epoch at each of these comes first: against PGD at 0.3 from the first step, training stays at a constant."""


@dataclass(frozen=True)
class Settings:
    """One-step adversarial training on MNIST, seed by seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    attack: Literal["fgsm", "pgd"] = "fgsm"
    """What the network is trained against: one step of 1.25 epsilon, or seven of a third of it."""
    start: Literal["unclipped", "clipped"] = "unclipped"
    """Whether the random start is cut to the box before the gradient; the published MNIST code does not."""
    init: Literal["torch", "torch_kernels", "torch_biases", "lecun"] = "torch"
    """How weights start: kernels and biases as PyTorch does, as published; or the other, or both, as Flax does: by
    LeCun's normal and at zero."""
    epochs: int = 10
    peak: float = 5e-3
    """The highest learning rate of the triangle."""
    rows: int = 10_000
    """Test images that are attacked, from the first on."""
    restarts: int = 10
    data_dir: Path | None = None
    out: Path = Path("runs/mnist_fast")
    smoke: bool = False
    """Try the script in seconds, on scikit-learn's digits."""


def main(settings: Settings) -> list[dict[str, float]]:
    """Trains and attacks one network a seed; a line a seed, then the mean. Finished seeds are not run again."""
    if settings.smoke:
        settings = dataclasses.replace(settings, seeds=(0,), epochs=1, rows=50, restarts=2)
    data = jn.data.load("digits" if settings.smoke else "mnist", settings.data_dir)
    results = []
    for seed in settings.seeds:
        name = f"{data.name}-{settings.attack}-{settings.start}-{settings.init}-{settings.epochs}-{settings.peak:g}"
        folder = settings.out / name / str(seed)
        record = folder / f"result-{settings.rows}-{settings.restarts}.json"
        results.append(recorded(record, partial(run, settings, data, seed, folder)))
        print(f"seed {seed}: " + describe(results[-1]), flush=True)
    mean = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    deviation = float(np.std([result["pgd"] for result in results]))
    print(f"mean of {len(results)}: {describe(mean)}, deviation under PGD {deviation:.2%}")
    return results


def run(settings: Settings, data: jn.data.Dataset, seed: int, folder: Path) -> dict[str, float]:
    """Trains one network and attacks it with PGD-50."""
    init_key, train_key, attack_key = jax.random.split(jax.random.key(seed), 3)
    net = jn.from_linen(jn.models.SmallCNN())
    x, y = jn.data.to_float(data.test.images[: settings.rows]), data.test.labels[: settings.rows]
    params, stats = net.init(init_key, x[:1])
    params = INITIALISERS[settings.init](init_key, params)
    total = settings.epochs * jn.data.steps_per_epoch(len(data.train.labels), 100)

    def objective(epsilon: float):
        return jn.objectives.adversarial(net, ATTACKS[settings.attack](STARTS[settings.start], epsilon))

    strong = partial(jn.attacks.pgd, threat=jn.Linf(EPSILON), steps=50, step_size=0.01)

    def watch(state: jn.training.TrainState) -> dict[str, float]:
        few = x[:500], y[:500]
        report = jn.evaluation.evaluate(
            attack_key, net.logits_fn(state.params, state.stats), *few, {"pgd": strong}, threat=jn.Linf(EPSILON)
        )
        return {"clean": report.accuracies()["clean"], "pgd-50 on 500": report.accuracies()["pgd"]}

    began = time.monotonic()
    for epsilon in WARM_UP[settings.attack]:
        optimizer, place = optax.adam(1e-3), folder / f"epsilon-{epsilon}"
        state = jn.training.init_state(train_key, params, stats, optimizer)
        step = jn.training.make_step(objective(epsilon), optimizer)
        state = jn.fit.fit(step, state, data.train, folder=place, epochs=1, batch_size=100)
        params, stats = state.params, state.stats
    optimizer = optax.adam(jn.optimizers.triangular(settings.peak, total))
    state = jn.training.init_state(train_key, params, stats, optimizer)
    state = jn.fit.fit(
        jn.training.make_step(objective(EPSILON), optimizer),
        state,
        data.train,
        folder=folder,
        epochs=settings.epochs,
        batch_size=100,
        evaluate=watch,
    )
    trained = time.monotonic()
    attack = jn.attacks.restarts(strong, settings.restarts)
    model = net.logits_fn(state.params, state.stats)
    report = jn.evaluation.evaluate(attack_key, model, x, y, {"pgd": attack}, threat=jn.Linf(EPSILON), batch_size=1000)
    print(report, flush=True)
    return {
        "clean": report.accuracies()["clean"],
        "pgd": report.accuracies()["pgd"],
        "train_minutes": (trained - began) / 60,
        "attack_minutes": (time.monotonic() - trained) / 60,
    }


def describe(result: dict[str, float]) -> str:
    return (
        f"clean {result['clean']:.2%}, PGD-50 {result['pgd']:.2%}, "
        f"{result['train_minutes']:.1f} min training, {result['attack_minutes']:.1f} min attack"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
