"""CleverHans on the network in PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

from benchmarks.networks import Loaded
from benchmarks.sides import ORDERS, NotOfferedError, from_torch, frozen, to_torch
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    if work.method != "pgd":
        raise NotOfferedError(work.method)
    net, (x, y) = frozen(loaded.twin), to_torch(loaded.x, loaded.y)
    bounds = {"norm": ORDERS[work.norm], "clip_min": 0.0, "clip_max": 1.0}
    attack = partial(projected_gradient_descent, net, x, work.epsilon, work.step_size, work.steps, y=y, **bounds)
    return lambda: from_torch(attack(sanity_checks=False))
