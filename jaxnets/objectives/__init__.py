"""Objectives: what training lowers, ``(params, stats, batch, key) -> (scalar, (stats, metrics))``."""

from jaxnets.objectives.adversarial import adversarial
from jaxnets.objectives.auxiliary import auxiliary
from jaxnets.objectives.standard import standard

__all__ = ["adversarial", "auxiliary", "standard"]
