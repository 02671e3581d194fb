"""The careful user's loop with the network through ``torch.compile``."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.networks import Loaded
from benchmarks.sides import by_hand
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    return by_hand.make(work, loaded, prepared=torch.compile)
