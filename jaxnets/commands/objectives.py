"""The names of objectives, attacks and augmentations on the command line, and the training steps made of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxnets import attacks, data, losses, objectives
from jaxnets.averaging import ema, with_average
from jaxnets.classifier import Classifier
from jaxnets.commands.run import THREATS, optimizer_of
from jaxnets.commands.settings import Settled
from jaxnets.data import Augmentation
from jaxnets.threats import Threat
from jaxnets.training import Step, make_free_step, make_step, scheduled
from jaxnets.types import Array, Attack, LogitsFn, Loss, Objective


class Parts(NamedTuple):
    """What an objective is made of.

    Attributes:
      command: whose learning rate, epsilon and beta may be traced.
      net, threat, loss: by their names.
      sources: other networks, trained before.
      ramp: from 0 at the first step to 1 in the middle of training, and 1 from there on.
    """

    command: Settled
    net: Classifier
    threat: Threat
    loss: Loss
    sources: Sequence[LogitsFn]
    ramp: Array

    @property
    def beta(self) -> Any:
        """Of the command, which has one for each objective that takes it."""
        return self.command.beta


STARTS = {
    "uniform": attacks.uniform,
    "uniform_unclipped": attacks.uniform_unclipped,
    "gaussian": attacks.gaussian(),
    "at_clean": attacks.at_clean,
}
ATTACKS: dict[str, Callable[[Settled, Threat], Attack]] = {
    "pgd": lambda c, threat: partial(attacks.pgd, threat=threat, steps=c.steps, start=STARTS[c.start]),
    "fgsm": lambda c, threat: partial(
        attacks.fgsm, threat=threat, step_size=1.25 * threat.epsilon, start=STARTS[c.start]
    ),
}


def _attack(p: Parts) -> Any:
    return ATTACKS[p.command.attack](p.command, p.threat)


def _fast(p: Parts) -> objectives.MinMax:
    return objectives.fast(p.net, p.threat, start=STARTS[p.command.start], loss=p.loss)


def _ramped(p: Parts) -> Threat:
    return replace(p.threat, epsilon=p.ramp * p.threat.epsilon)  # pyright: ignore


OBJECTIVES: dict[str, Callable[[Parts], Objective]] = {
    "adversarial": lambda p: objectives.adversarial(p.net, _attack(p), loss=p.loss),
    "standard": lambda p: objectives.standard(p.net, loss=p.loss),
    "fast": _fast,
    "n_fgsm": lambda p: objectives.n_fgsm(p.net, p.threat, loss=p.loss),
    "grad_align": lambda p: objectives.grad_align(_fast(p), p.net, p.threat, weight=p.beta, loss=p.loss),
    "free": lambda p: objectives.standard(p.net, loss=p.loss),
    "trades": lambda p: objectives.trades(p.net, _attack(p), beta=p.beta, loss=p.loss),
    "mart": lambda p: objectives.mart(p.net, _attack(p), beta=p.beta),
    "kurakin": lambda p: objectives.kurakin(p.net, attacks.least_likely_class, threat=p.threat, loss=p.loss),
    "virtual_adversarial": lambda p: objectives.virtual_adversarial(p.net, p.threat, weight=p.beta, loss=p.loss),
    "ensemble_adversarial": lambda p: objectives.ensemble_adversarial(p.net, _attack(p), p.sources, loss=p.loss),
    "auxiliary": lambda p: objectives.auxiliary(p.net, loss=p.loss),
    "ibp": lambda p: objectives.ibp(p.net, _ramped(p), kappa=1 - p.ramp / 2),
    "crown_ibp": lambda p: objectives.crown_ibp(p.net, _ramped(p), kappa=1 - p.ramp / 2, beta=1 - p.ramp),
}
AUGMENTATIONS: dict[str, Callable[[int, int], Augmentation]] = {
    "crop": lambda classes, side: partial(data.random_crop, padding=max(1, side // 8)),
    "flip": lambda classes, side: data.random_flip,
    "cutout": lambda classes, side: partial(data.cutout, size=max(1, side // 2)),
    "mixup": lambda classes, side: partial(data.mixup, classes=classes),
    "cutmix": lambda classes, side: partial(data.cutmix, classes=classes),
}
"""``(classes, side of the images) -> augmentation``: sizes are those of the papers for 32x32, in proportion."""


def step_of(
    command: Settled, net: Classifier, *, classes: int, side: int, steps: int, sources: Sequence[LogitsFn] = ()
) -> Step:
    """The step of a training of so many ``steps``; the configuration's learning rate, epsilon and beta may be traced.

    Args:
      command: the configuration.
      net: the network.
      classes: of the data.
      side: of its images.
      steps: of the whole training, which schedules depend on.
      sources: other networks that are attacked.
    """
    threat, optimizer = THREATS[command.threat](command.epsilon), optimizer_of(command, steps)
    loss = losses.smoothed(command.label_smoothing) if command.label_smoothing else losses.cross_entropy
    changes = [AUGMENTATIONS[name](classes, side) for name in command.augment]

    def at(t: Array) -> Step:
        ramp = jnp.minimum(2 * t / steps, 1.0)
        objective = OBJECTIVES[command.objective](Parts(command, net, threat, loss, sources, ramp))
        if command.awp is not None:
            objective = objectives.awp(objective, gamma=command.awp)
        if command.objective == "free":
            return make_free_step(objective, optimizer, threat=threat, replays=command.replays, augmentations=changes)
        return make_step(objectives.augmented(objective, *changes), optimizer)

    step = scheduled(at)
    return step if command.ema is None else with_average(step, ema(command.ema))
