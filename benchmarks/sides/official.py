"""AutoAttack of its authors, github.com/fra31/auto-attack."""

from collections.abc import Callable
from typing import Any

from autoattack import AutoAttack

from benchmarks.networks import Loaded
from benchmarks.sides import NORMS, NotOfferedError, from_torch, to_torch, torch_device
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    if work.method != "autoattack":
        raise NotOfferedError(work.method)
    x, y = to_torch(loaded.x, loaded.y)
    attack = AutoAttack(
        loaded.twin(), norm=NORMS[work.norm], eps=work.epsilon, version="standard", device=torch_device(), verbose=False
    )
    # It reshapes gradients by views, which those of channels-last images refuse.
    return lambda: from_torch(attack.run_standard_evaluation(x.contiguous(), y, bs=500))
