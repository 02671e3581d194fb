"""Attacks: pure functions ``(key, logits_fn, x, target, *, threat, ...) -> x_adv``, bound by `functools.partial`."""

from jaxnets.attacks.combinators import restarts, worst_of
from jaxnets.attacks.gradient import fgsm, pgd
from jaxnets.attacks.start import at_clean, uniform, uniform_unclipped

__all__ = ["at_clean", "fgsm", "pgd", "restarts", "uniform", "uniform_unclipped", "worst_of"]
