"""Foolbox on the network in PyTorch."""

from collections.abc import Callable
from typing import Any

import foolbox

from benchmarks.networks import Loaded
from benchmarks.sides import NotOfferedError, from_torch, frozen, to_torch, torch_device
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    attack, epsilon = attack_of(work), bound(work)
    model = foolbox.PyTorchModel(frozen(loaded.twin), bounds=(0, 1), device=torch_device())
    x, y = to_torch(loaded.x, loaded.y)
    return lambda: from_torch(attack(model, x, foolbox.criteria.Misclassification(y), epsilons=epsilon)[1])


def attack_of(work: Work) -> Any:
    """Foolbox's attack, which takes a model of any framework."""
    if work.method == "cw":
        return foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=1, steps=work.steps, initial_const=1.0)
    kinds = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD, "l1": foolbox.attacks.L1PGD}
    if work.method != "pgd":
        raise NotOfferedError(work.method)
    return kinds[work.norm](abs_stepsize=work.step_size, steps=work.steps)


def bound(work: Work) -> float | None:
    """What bounds the perturbation, unless the attack looks for the smallest."""
    return None if work.method == "cw" else work.epsilon
