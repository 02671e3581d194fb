"""One-step adversarial training as at scale, on CIFAR-10: two networks, trained in two ways, epsilon by epsilon.

Claim (Kurakin et al. 2017, https://arxiv.org/abs/1611.01236): one-step adversarial training costs little clean accuracy
and holds against one-step attacks of every size, and a deeper network gains more from it.

Command: ``python -m experiments.kurakin_table`` for narrow networks on a CPU; ``--form full`` on a GPU (not run).
Hardware: two cores of an AMD EPYC, jax 0.10.2, 20 minutes of training while other work ran on them. Rebuilt CIFAR-10,
seed 0, 1,000 test rows, top-1/top-5 as below::

    standard                62.9/97    21.9/70    10.3/55     8.0/48     8.4/47
    adversarial             61.7/96    59.0/96    49.4/94    30.5/87    15.9/73
    deeper, standard        61.6/97    25.4/79    12.0/63    10.3/53    10.1/51
    deeper, adversarial     63.0/97    61.8/97    52.1/95    33.6/89    18.6/74

Adversarial training costs no clean accuracy beyond chance, and the deeper network gains more from it, as published;
large steps still break networks of this size. All of it is under one step towards the least likely class, as in the
paper: one that knows the label (FGSM) leaves the four 4.2, 31.7, 4.7 and 32.5 at 2, and at most 7.3 at 16.

Published, ImageNet, Inception v3, top-1/top-5 at epsilon 0, 2, 4, 8, 16 of 255::

    standard                78.4/94.0  30.8/60.0  27.2/55.6  27.2/55.1  29.5/57.2
    adversarial             77.6/93.8  73.5/91.7  74.0/91.9  74.5/92.0  73.9/91.4
    deeper, standard        78.7/94.4  33.5/63.3  30.0/58.9  30.0/58.1  31.6/59.5
    deeper, adversarial     78.1/94.1  75.4/92.6  75.7/92.7  75.6/92.5  74.4/91.6
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxnets as jn
from experiments import recorded
from jaxnets import attacks, models, objectives

EPSILONS = (0, 2, 4, 8, 16)
"""Of 255."""


class Form(NamedTuple):
    """A size of the experiment; the paper's Inception is as much too large for images of 32x32 as for two cores."""

    baseline: Callable[[], Any]
    deeper: Callable[[], Any]
    training_rows: int
    epochs: int
    rows: int


NARROW = partial(models.cifar_resnet, width=8)
WIDE = {"classes": 10, "stem": models.cifar_stem}
FORMS = {
    "narrow": Form(partial(NARROW, 20), partial(NARROW, 32), 10_000, 8, 1000),
    "full": Form(partial(models.resnet18, **WIDE), partial(models.resnet50, **WIDE), 50_000, 40, 10_000),
}
OBJECTIVES: dict[str, Callable[[jn.Classifier], Any]] = {
    "standard": lambda net: objectives.standard(net),
    "adversarial": lambda net: objectives.kurakin(net, attacks.least_likely_class, threat=jn.Linf(16 / 255)),
}


@dataclass(frozen=True)
class Settings:
    """Two networks, each trained in two ways, under one step towards the least likely class."""

    form: Literal["narrow", "full"] = "narrow"
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 64
    peak: float = 3e-3
    """The highest learning rate of the triangle."""
    data_dir: Path | None = None
    out: Path = Path("runs/kurakin_table")
    smoke: bool = False
    """Try the script in a minute, on scikit-learn's digits and the first network."""


def main(settings: Settings) -> dict[str, Any]:
    """Trains and attacks every network; a line each. Finished ones are not run again."""
    form = FORMS[settings.form]
    networks = {"": form.baseline, "deeper, ": form.deeper}
    if settings.smoke:
        form, networks = form._replace(epochs=1, rows=50), {"": lambda: models.MLP((32,))}
    data = jn.data.load("digits" if settings.smoke else "cifar10", settings.data_dir)
    print(f"{'':22}" + "".join(f"{epsilon:>12}" for epsilon in EPSILONS) + f"{'minutes':>9}", flush=True)
    found: dict[str, Any] = {}
    for size, make in networks.items():
        for name, objective in OBJECTIVES.items():
            results = [finished(settings, form, size + name, make, objective, data, seed) for seed in settings.seeds]
            found[size + name] = results
            top = np.mean([result["top"] for result in results], axis=0)
            minutes = np.mean([result["minutes"] for result in results])
            print(f"{size + name:22}" + "".join(f"{a:7.1%}/{b:.0%}".rjust(12) for a, b in top) + f"{minutes:9.1f}")
    print(f"top-1/top-5 under one step of epsilon / 255, {len(settings.seeds)} seeds")
    return found


def finished(
    settings: Settings, form: Form, name: str, make: Any, objective: Any, data: jn.data.Dataset, seed: int
) -> dict[str, Any]:
    """The result of one network, run unless its record is there."""
    how = f"{data.name}-{settings.form}-{form.epochs}-{settings.batch_size}-{settings.peak:g}"
    folder = settings.out / how / f"{name.replace(', ', '-')}-{seed}"
    record = folder / f"result-{form.rows}.json"
    return recorded(record, partial(run, settings, form, make, objective, data, seed, folder))


def run(
    settings: Settings, form: Form, make: Any, objective: Any, data: jn.data.Dataset, seed: int, folder: Path
) -> dict[str, Any]:
    """Trains one network; its accuracies ``[epsilon, (top-1, top-5)]``."""
    init_key, train_key, attack_key = jax.random.split(jax.random.key(seed), 3)
    net, rows = jn.from_linen(make()), jn.data.Split(*(part[: form.training_rows] for part in data.train))
    x, y = jn.data.to_float(data.test.images[: form.rows]), data.test.labels[: form.rows]
    total = form.epochs * jn.data.steps_per_epoch(len(rows.labels), settings.batch_size)
    optimizer = optax.adamw(jn.optimizers.triangular(settings.peak, total), weight_decay=1e-4)
    state = jn.training.init_state(train_key, *net.init(init_key, x[:1]), optimizer)
    began = time.monotonic()
    step = jn.training.make_step(objective(net), optimizer)
    state = jn.fit.fit(step, state, rows, folder=folder, epochs=form.epochs, batch_size=settings.batch_size)
    minutes = (time.monotonic() - began) / 60
    model = net.logits_fn(state.params, state.stats)
    return {"top": [_top(attack_key, model, x, y, epsilon / 255) for epsilon in EPSILONS], "minutes": minutes}


def _top(key: jax.Array, model: Any, x: np.ndarray, y: np.ndarray, epsilon: float) -> tuple[float, float]:
    """Top-1 and top-5 accuracy of all rows under one step towards the least likely class, as published."""
    found = np.zeros(len(y), int)
    for rows, valid in jn.data.padded_batches(len(y), 100):
        found[rows[:valid]] = np.asarray(_places(key, model, x[rows], y[rows], epsilon))[:valid]
    return float(np.mean(found < 1)), float(np.mean(found < 5))


@jax.jit
def _places(key: jax.Array, model: Any, x: jax.Array, y: jax.Array, epsilon: float) -> jax.Array:
    """How many classes come before each row's own."""
    logits = model(attacks.least_likely_class(key, model, x, y, threat=jn.Linf(epsilon)))
    return jnp.sum(logits > jnp.take_along_axis(logits, y[:, None], axis=1), axis=1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
