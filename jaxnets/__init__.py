"""Train, attack and evaluate neural networks as pure functions in JAX.

Everything is loaded when first used, so that the command answers a request for help without waiting for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxnets import (
        attacks,
        averaging,
        certificates,
        checkpoint,
        cpu,
        data,
        diagnostics,
        evaluation,
        fit,
        losses,
        models,
        objectives,
        optimizers,
        parallel,
        plots,
        substitute,
        sweeps,
        threats,
        training,
        transferability,
        types,
        verification,
        weights,
    )
    from jaxnets.classifier import Classifier, from_linen, normalized
    from jaxnets.threats import L0, L1, L2, Linf, Masked

__version__ = "0.1.0"

__all__ = [
    "L0", "L1", "L2", "Classifier", "Linf", "Masked", "attacks", "averaging", "certificates", "checkpoint", "cpu",
    "data", "diagnostics", "evaluation", "fit", "from_linen", "losses", "models", "normalized", "objectives",
    "optimizers", "parallel", "plots", "substitute", "sweeps", "threats", "training", "transferability", "types",
    "verification", "weights",
]  # fmt: skip

_HOMES = {
    "Classifier": "classifier", "from_linen": "classifier", "normalized": "classifier",
    "L0": "threats", "L1": "threats", "L2": "threats", "Linf": "threats",
    "Masked": "threats",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxnets.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"jaxnets.{name}")
    raise AttributeError(f"module 'jaxnets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
