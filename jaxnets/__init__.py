"""Train, attack and evaluate neural networks as pure functions in JAX.

The modules ``data``, ``evaluation``, ``checkpoint``, ``plots`` and ``fit`` are loaded when first used.
"""

import importlib

from jaxnets import attacks, losses, models, objectives, parallel, threats, training, types
from jaxnets.classifier import Classifier, from_linen
from jaxnets.threats import L1, L2, Linf

__version__ = "0.1.0"

__all__ = [
    "L1", "L2", "Classifier", "Linf", "attacks", "from_linen", "losses", "models", "objectives", "parallel", "threats",
    "training", "types",
]  # fmt: skip

_ON_USE = {"checkpoint", "data", "evaluation", "fit", "optimizers", "plots"}


def __getattr__(name: str):
    if name in _ON_USE:
        return importlib.import_module(f"jaxnets.{name}")
    raise AttributeError(f"module 'jaxnets' has no attribute {name!r}")
