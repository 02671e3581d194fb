"""TRADES and adversarial weight perturbation on CIFAR-10: what each adds to adversarial training.

Claim (Wu et al. 2020, https://arxiv.org/abs/2004.05884): perturbing the weights as well as the rows makes adversarial
training, TRADES and MART more robust, TRADES with it the most.

Command: ``python -m experiments.cifar10_trades_awp`` for a narrow network and a tenth of the data on a CPU;
``--form full --peak 0.1`` for the published size on a GPU (not run).
Hardware: not run yet.

Published, ResNet-18 under AutoAttack (one library, same settings): adversarial 48.7, TRADES 49.5, MART 47.5; with AWP
50.8, 51.6, 50.0.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

import jaxnets as jn
from experiments import cifar10_fast
from experiments.cifar10_fast import THREAT, Form
from jaxnets import attacks, objectives

FORMS = {
    "narrow": cifar10_fast.FORMS["narrow"]._replace(rows=250),
    "full": cifar10_fast.FORMS["full"]._replace(epochs=200, rows=10_000),
}
PGD_10 = partial(attacks.pgd, threat=THREAT, steps=10, step_size=2 / 255, start=attacks.gaussian(1e-3))


def adversarial(net: jn.Classifier) -> Any:
    return objectives.adversarial(net, PGD_10)


def trades(net: jn.Classifier) -> Any:
    return objectives.trades(net, PGD_10, beta=6.0)


def mart(net: jn.Classifier) -> Any:
    return objectives.mart(net, PGD_10, beta=6.0)


METHODS = {
    "adversarial": adversarial,
    "trades": trades,
    "mart": mart,
    "adversarial, awp": lambda net: objectives.awp(adversarial(net), gamma=0.01),
    "trades, awp": lambda net: objectives.awp(trades(net), gamma=0.005),
    "mart, awp": lambda net: objectives.awp(mart(net), gamma=0.01),
}


@dataclass(frozen=True)
class Settings(cifar10_fast.Settings):
    """Three objectives, each without and with adversarial weight perturbation."""

    out: Path = Path("runs/cifar10_trades_awp")


def main(settings: Settings) -> dict[str, dict[str, float]]:
    """A line a method: clean accuracy, and what AutoAttack leaves."""

    def strong(form: Form) -> dict[str, Any]:
        pgd = partial(attacks.pgd, threat=THREAT, steps=20, step_size=2 / 255)
        return {"PGD-20": pgd, "AutoAttack": attacks.cascade(attacks.standard(THREAT))}

    return cifar10_fast.compare(settings, FORMS[settings.form], METHODS, strong)


if __name__ == "__main__":
    main(tyro.cli(Settings))
