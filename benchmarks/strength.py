"""Foolbox as an oracle: at the same steps, do our attacks leave no more survivors and no larger perturbations?

Command: ``python -m benchmarks.strength``, with the extra ``peers``. Foolbox attacks the same JAX function, through its
``JAXModel``.

Found with jax 0.10.2 and Foolbox 3.3.4 on the SmallCNN of `benchmarks.networks` (trained against Linf 0.3), 198 rows of
MNIST, 100 steps, on two cores of an AMD EPYC; keys 0 to 7 for PGD, 0 for the others::

                      survivors: ours, Foolbox   median norm: ours, Foolbox
    pgd, Linf                   94.1%   93.8%
    pgd, L2                     89.3%   88.8%
    ddn                          0.0%    0.0%                   2.527    2.527
    fmn, Linf                   26.8%   57.6%                   0.655      inf
    fmn, L2                      0.0%   57.6%                   2.354      inf
    fmn, L1                      1.0%   58.6%                   13.81      inf
    fmn, L0                     70.2%   80.3%                     inf      inf
    deepfool, Linf               0.0%    0.0%                  0.7635   0.7636
    deepfool, L2                28.8%   40.9%                   5.998    6.303
    carlini_wagner               0.0%    0.0%                   2.958    3.139

Between two starts of PGD lies about a point; from one and the same start it leaves as many rows as Foolbox's.

AutoAttack beside that of its authors, rows of 1,000 that survive, key 0 and the time for a seed: ``python -m benchmarks
--works "small_cnn autoattack l2 1000" --sides jaxnets official --rounds 0`` and so on, with
github.com/fra31/auto-attack installed::

                    small_cnn (0.3, 2, 10)     resnet18_8 (8/255, 0.5, 12)
                    jaxnets   official         jaxnets   official
    linf              89.3%      89.4%           30.9%      31.0%
    l2                22.1%      23.5%           45.0%      45.0%
    l1                14.9%      15.2%           11.1%      11.3%
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

import jaxnets as jn
from benchmarks import networks
from jaxnets.types import Attack
from jaxnets.verification import norms


class Pair(NamedTuple):
    """An attack of ours and Foolbox's of the same kind. ``epsilon`` is None for the smallest perturbation."""

    ours: Callable[..., Attack]
    foolbox: Callable[[Any], Any]
    threat: Any
    epsilon: float | None = None
    starts: int = 1
    """How often an attack with a random start is run; its survivors and norms are means."""


def _pairs(steps: int) -> dict[str, Pair]:
    attacks, free = jn.attacks, np.inf
    return {
        "pgd, Linf": Pair(
            partial(attacks.pgd, steps=steps),
            lambda fb: fb.LinfPGD(rel_stepsize=2.5 / steps, steps=steps),
            jn.Linf(0.3),
            0.3,
            starts=8,
        ),
        "pgd, L2": Pair(
            partial(attacks.pgd, steps=steps),
            lambda fb: fb.L2PGD(rel_stepsize=2.5 / steps, steps=steps),
            jn.L2(2.0),
            2.0,
            starts=8,
        ),
        "ddn": Pair(partial(attacks.ddn, steps=steps), lambda fb: fb.DDNAttack(steps=steps), jn.L2(free)),
        "fmn, Linf": Pair(partial(attacks.fmn, steps=steps), lambda fb: fb.LInfFMNAttack(steps=steps), jn.Linf(free)),
        "fmn, L2": Pair(partial(attacks.fmn, steps=steps), lambda fb: fb.L2FMNAttack(steps=steps), jn.L2(free)),
        "fmn, L1": Pair(partial(attacks.fmn, steps=steps), lambda fb: fb.L1FMNAttack(steps=steps), jn.L1(free)),
        "fmn, L0": Pair(partial(attacks.fmn, steps=steps), lambda fb: fb.L0FMNAttack(steps=steps), jn.L0(free)),
        "deepfool, Linf": Pair(
            partial(attacks.deepfool, steps=50), lambda fb: fb.LinfDeepFoolAttack(steps=50), jn.Linf(free)
        ),
        "deepfool, L2": Pair(
            partial(attacks.deepfool, steps=50), lambda fb: fb.L2DeepFoolAttack(steps=50), jn.L2(free)
        ),
        "carlini_wagner": Pair(
            partial(attacks.carlini_wagner, steps=10 * steps, rounds=9, initial_const=0.01),
            lambda fb: fb.L2CarliniWagnerAttack(binary_search_steps=9, steps=10 * steps, initial_const=0.01),
            jn.L2(free),
        ),
    }


@dataclass(frozen=True)
class Settings:
    """Every pair on the first rows of MNIST."""

    rows: int = 200
    steps: int = 100
    only: tuple[str, ...] = ()
    """Names of pairs; all unless given."""
    data_dir: Path | None = None


def main(settings: Settings) -> dict[str, dict[str, tuple[float, float]]]:
    """Survivors and median norm over right rows (infinite for survivors), ours and Foolbox's; a line a pair."""
    import foolbox

    warnings.simplefilter("ignore")
    loaded = networks.load("small_cnn", data_dir=settings.data_dir, rows=settings.rows)
    model = loaded.model
    right = np.flatnonzero(np.argmax(model(loaded.x), axis=-1) == loaded.y)
    x, y = jax.numpy.asarray(loaded.x[right]), jax.numpy.asarray(loaded.y[right])
    judged = foolbox.JAXModel(jax.jit(model), bounds=(0, 1))
    print(
        f"{len(right)} rows of MNIST, {settings.steps} steps{'':3}survivors: ours, Foolbox   median norm: ours, Foolbox"
    )
    found = {}
    for name, pair in _pairs(settings.steps).items():
        if settings.only and name not in settings.only:
            continue
        ours = partial(_ours, pair, model, x, y)
        theirs = partial(_theirs, pair, foolbox, judged, x, y)
        found[name] = {
            side: _mean([_judge(model, pair, x, y, attack(start)) for start in range(pair.starts)])
            for side, attack in (("ours", ours), ("foolbox", theirs))
        }
        (left, size), (their_left, their_size) = found[name].values()
        print(f"{name:18}{left:26.1%}{their_left:8.1%}{size:24.4g}{their_size:9.4g}", flush=True)
    return found


def _ours(pair: Pair, model: Any, x: jax.Array, y: jax.Array, start: int) -> jax.Array:
    return pair.ours(jax.random.key(start), model, x, y, threat=pair.threat)


def _theirs(pair: Pair, foolbox: Any, model: Any, x: jax.Array, y: jax.Array, start: int) -> jax.Array:
    # It draws on from where the call before has left its generator.
    goal = foolbox.criteria.Misclassification(y)
    return pair.foolbox(foolbox.attacks)(model, x, goal, epsilons=pair.epsilon)[1]


def _mean(judged: list[tuple[float, float]]) -> tuple[float, float]:
    left, size = np.mean(judged, axis=0)
    return float(left), float(size)


def _judge(model: Any, pair: Pair, x: jax.Array, y: jax.Array, x_adv: Any) -> tuple[float, float]:
    # Foolbox's Carlini-Wagner gives a black image where it has found nothing: that is no success, whatever its class.
    black = np.all(np.asarray(x_adv) == 0, axis=(1, 2, 3))
    survived = black | (np.argmax(model(x_adv), axis=-1) == np.asarray(y))
    return float(survived.mean()), float(np.median(np.where(survived, np.inf, norms(pair.threat, x_adv, x))))


if __name__ == "__main__":
    main(tyro.cli(Settings))
