"""TRADES and adversarial weight perturbation on CIFAR-10: what each adds to adversarial training.

Claim (Wu et al. 2020, https://arxiv.org/abs/2004.05884): perturbing the weights as well as the rows makes adversarial
training, TRADES and MART more robust, TRADES with it the most.

Command: ``python -m experiments.cifar10_trades_awp`` for a narrow network that sees 250 rows 120 times on a CPU, PGD-3
instead of PGD-10, beta 20 instead of 6, no MART; ``--form full`` for the published size on a GPU (not run).
Hardware: two cores of an AMD EPYC, jax 0.10.2, 9.5 minutes in all. Rebuilt CIFAR-10, seed 0, 4,000 test rows under PGD
on the cross-entropy and on the margin; seconds of training::

                        clean      PGD-20       CW-20  seconds
    adversarial         31.7%       10.8%       10.7%       85
    adversarial, awp    27.7%       16.1%       15.4%      105
    trades              30.8%       15.3%       13.8%      117
    trades, awp         28.9%       17.0%       15.5%      163

The published order: TRADES is more robust than plain adversarial training, perturbed weights make both more robust, and
TRADES with them leads. So it is with seed 1, under PGD-20: 6.9%, 14.9%, 14.3% and 16.6%. What they are for is robust
overfitting: the plain network withstands PGD-20 on 70% of its training rows. With 500 rows 60 times the methods are
within two points of each other, with 1,000 rows 30 times TRADES and plain training are as robust.

Published, ResNet-18 under AutoAttack (one library, same settings): adversarial 48.7, TRADES 49.5, MART 47.5; with AWP
50.8, 51.6, 50.0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

import jaxnets as jn
from experiments import cifar10_fast
from experiments.cifar10_fast import THREAT, Form
from jaxnets import attacks, losses, objectives

FORMS = {
    # So few rows, so often, that robust overfitting happens to a network this narrow.
    "narrow": cifar10_fast.FORMS["narrow"]._replace(training_rows=250, epochs=120, batch_size=50, rows=4_000),
    "full": cifar10_fast.FORMS["full"]._replace(epochs=200, rows=10_000),
}


def methods_by(steps: int, beta: float, gammas: dict[str, float]) -> dict[str, Callable[[jn.Classifier], Any]]:
    """Objectives against PGD of so many steps, each alone and with weights perturbed by so much of a layer's norm."""
    pgd = partial(attacks.pgd, threat=THREAT, steps=steps, step_size=20 / 255 / steps, start=attacks.gaussian(1e-3))
    plain: dict[str, Callable[[jn.Classifier], Any]] = {
        "adversarial": lambda net: objectives.adversarial(net, pgd),
        "trades": lambda net: objectives.trades(net, pgd, beta=beta),
        "mart": lambda net: objectives.mart(net, pgd, beta=beta),
    }
    methods = {}
    for name, gamma in gammas.items():
        methods[name] = plain[name]
        methods[f"{name}, awp"] = lambda net, of=plain[name], gamma=gamma: objectives.awp(of(net), gamma=gamma)
    return methods


METHODS = {
    # Of a network this narrow the logits are small, and the divergence is the smaller: it takes a larger weight.
    "narrow": methods_by(3, 20.0, {"adversarial": 0.005, "trades": 0.005}),
    "full": methods_by(10, 6.0, {"adversarial": 0.01, "trades": 0.005, "mart": 0.01}),
}


@dataclass(frozen=True)
class Settings(cifar10_fast.Settings):
    """Three objectives, each without and with adversarial weight perturbation."""

    peak: float = 0.1
    """The highest learning rate."""
    out: Path = Path("runs/cifar10_trades_awp")


def main(settings: Settings) -> dict[str, dict[str, float]]:
    """A line a method: clean accuracy, and what attacks leave."""

    pgd = partial(attacks.pgd, threat=THREAT, steps=20, step_size=2 / 255)

    def strong(form: Form) -> dict[str, Any]:
        if settings.form == "full":
            return {"PGD-20": pgd, "AutoAttack": attacks.cascade(attacks.standard(THREAT))}
        # AutoAttack takes longer than training here; on the margin PGD comes near it.
        return {"PGD-20": pgd, "CW-20": partial(pgd, loss=losses.margin)}

    return cifar10_fast.compare(settings, FORMS[settings.form], METHODS[settings.form], strong)


if __name__ == "__main__":
    main(tyro.cli(Settings))
