"""One-step adversarial training of a PreActResNet-18 on CIFAR-10: robust in minutes.

Claim (Wong et al. 2020, https://arxiv.org/abs/2001.03994): FGSM with a random start trains networks as robust as free
training and PGD do, at a fraction of the cost.

Command: ``python -m experiments.cifar10_fast`` for a narrow network and a tenth of the data on a CPU;
``--form full`` for the published recipe on a GPU (not run).
Hardware: two cores of an AMD EPYC, jax 0.10.2, 11 minutes in all. Rebuilt CIFAR-10, seed 0, 500 test rows; seconds of
training::

                        clean    PGD-50x2  seconds
    standard            50.2%        0.8%       41
    fast                30.6%       22.6%       52
    n_fgsm              30.4%       21.0%       46
    free                33.6%       24.4%      159
    pgd-7               35.8%       26.4%      271

Methods take as many passes over the rows as in the papers, in proportion: in a fifth of the time FGSM with a random
start is nearly as robust as PGD-7, and in three fifths free training.

Published (rows of 15, 12 and 40 epochs), clean and PGD-50 with 10 restarts: FGSM 83.8 and 46.1 in the paper, 79.3 to
79.5 and 44.9 to 45.3 in reruns; free 77.0 to 78.4 and 46.0 to 46.2; PGD-7 86.8 and 46.3.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
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
from jaxnets import attacks, objectives
from jaxnets.training import Step, make_free_step, make_step
from jaxnets.types import Attack

THREAT = jn.Linf(8 / 255)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
REPLAYS = 8
LONGER = {"free": 96 / 15, "pgd-7": 40 / 15}
"""How many times as many passes over the rows as the others take, as published; each of free's batches is eight."""


class Form(NamedTuple):
    """A size of the experiment."""

    width: int
    dtype: Any
    training_rows: int
    epochs: int
    rows: int
    restarts: int
    top: float = 0.4
    """The share of the steps at which the rate is highest; 0.5 as published."""
    batch_size: int = 128


FORMS = {
    "narrow": Form(8, None, 5_000, 6, 500, 2),
    "full": Form(64, jnp.bfloat16, 50_000, 15, 10_000, 10, top=0.5),
}


def pgd_7(net: jn.Classifier) -> Any:
    return objectives.adversarial(
        net, partial(attacks.pgd, threat=THREAT, steps=7, step_size=2 / 255, start=attacks.uniform)
    )


METHODS: dict[str, Callable[[jn.Classifier], Any]] = {
    "standard": lambda net: objectives.standard(net),
    "fast": lambda net: objectives.fast(net, THREAT, start=attacks.uniform),
    "n_fgsm": lambda net: objectives.n_fgsm(net, THREAT),
    "free": lambda net: objectives.standard(net),
    "pgd-7": pgd_7,
}


@dataclass(frozen=True)
class Settings:
    """Every method under one recipe: SGD with momentum, a cyclic rate, crops and flips."""

    methods: tuple[str, ...] = ()
    """All of the experiment's unless given."""
    form: Literal["narrow", "full"] = "narrow"
    seeds: tuple[int, ...] = (0,)
    peak: float = 0.2
    """The highest learning rate; a fifth of it in free training, as published."""
    epochs: int | None = None
    """Unless given the form's; of free and pgd-7 6.4 and 2.7 times as many, as published."""
    data_dir: Path | None = None
    out: Path = Path("runs/cifar10_fast")
    smoke: bool = False
    """Try the script in a minute, on scikit-learn's digits."""


def main(settings: Settings) -> dict[str, dict[str, float]]:
    """Trains and attacks a network a method; a line each. Finished ones are not run again."""
    form = FORMS[settings.form]

    def strong(form: Form) -> dict[str, Attack]:
        pgd = partial(attacks.pgd, threat=THREAT, steps=50, step_size=2 / 255)
        return {f"PGD-50x{form.restarts}": attacks.restarts(pgd, form.restarts)}

    return compare(settings, form, METHODS, strong)


def compare(
    settings: Any,
    form: Form,
    methods: Mapping[str, Callable[[jn.Classifier], Any]],
    suite_of: Callable[[Form], dict[str, Any]],
) -> dict[str, dict[str, float]]:
    """A table with a row a method; means over the seeds."""
    chosen = settings.methods or tuple(methods)
    if settings.smoke:
        settings = dataclasses.replace(settings, seeds=settings.seeds[:1])
        chosen, form = tuple(methods)[:2], form._replace(width=4, dtype=None, epochs=1, rows=20, restarts=1)
    form = form._replace(epochs=settings.epochs or form.epochs)
    unknown = sorted(set(chosen) - methods.keys())
    if unknown:
        raise SystemExit(f"there are no methods {unknown}, only {', '.join(methods)}")
    data = jn.data.load("digits" if settings.smoke else "cifar10", settings.data_dir)
    suite = suite_of(form)
    print(f"{'':16}{'clean':>9}" + "".join(f"{name:>12}" for name in suite) + f"{'seconds':>9}", flush=True)
    size = f"{data.name}-{form.width}-{form.training_rows}-{form.epochs}-{settings.peak:g}"

    def finished(name: str, seed: int) -> dict[str, float]:
        folder = settings.out / size / f"{name}-{seed}"
        record = folder / f"result-{form.rows}-{form.restarts}.json"
        return recorded(record, partial(run, settings, form, name, methods[name], suite, data, seed, folder))

    found = {}
    for name in chosen:
        results = [finished(name, seed) for seed in settings.seeds]
        found[name] = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        shares = f"{found[name]['clean']:9.1%}" + "".join(f"{found[name][attack]:12.1%}" for attack in suite)
        print(f"{name:16}{shares}{found[name]['seconds']:9.0f}", flush=True)
    print(f"mean of {len(settings.seeds)} seeds, {form.epochs} epochs, width {form.width}")
    return found


def run(
    settings: Any,
    form: Form,
    name: str,
    method: Callable[[jn.Classifier], Any],
    suite: dict[str, Any],
    data: jn.data.Dataset,
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """Trains one network and attacks it."""
    init_key, train_key, attack_key = jax.random.split(jax.random.key(seed), 3)
    rows = jn.data.Split(*(part[: form.training_rows] for part in data.train))
    colour = rows.images.shape[-1] == 3
    net = network(form.width, form.dtype, colour)
    x, y = jn.data.to_float(data.test.images[: form.rows]), data.test.labels[: form.rows]
    replays = REPLAYS if name == "free" else 1
    epochs = math.ceil(form.epochs * LONGER.get(name, 1) / replays)
    updates = replays * epochs * jn.data.steps_per_epoch(len(rows.labels), form.batch_size)
    peak = settings.peak / 5 if name == "free" else settings.peak
    rate = jn.optimizers.triangular(peak, updates, top=form.top)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    state = jn.training.init_state(train_key, *net.init(init_key, x[:1]), optimizer)
    augmentations = (jn.data.random_crop, jn.data.random_flip) if colour else ()
    step: Step = make_step(objectives.augmented(method(net), *augmentations), optimizer)
    if name == "free":
        state = state._replace(perturbation=jnp.zeros((form.batch_size, *x.shape[1:])))
        step = make_free_step(method(net), optimizer, threat=THREAT, replays=replays, augmentations=augmentations)
    began = time.monotonic()
    state = jn.fit.fit(step, state, rows, folder=folder, epochs=epochs, batch_size=form.batch_size)
    seconds = time.monotonic() - began
    # In float32, as published.
    model = network(form.width, None, colour).logits_fn(state.params, state.stats)
    accuracies = jn.evaluation.evaluate(attack_key, model, x, y, suite, threat=THREAT).accuracies()
    return accuracies | {"seconds": seconds}


def network(width: int, dtype: Any, colour: bool) -> jn.Classifier:
    """For colours or grey, in their own units."""
    net = jn.from_linen(jn.models.preact_resnet18(10, width=width, dtype=dtype))
    return jn.normalized(net, MEAN if colour else 0.5, STD if colour else 0.25)


if __name__ == "__main__":
    main(tyro.cli(Settings))
