"""Attacks: pure functions ``(key, logits_fn, x, target, *, threat, ...) -> x_adv``, bound by `functools.partial`.

Inside a ball, by gradients: `fgsm`, `pgd` and what is made of them (`bim`, `least_likely_class`, `mi_fgsm`, `ni_fgsm`,
`di_fgsm`, `ti_fgsm`, `adam_pgd`), `apgd`, `apgd_targeted`. The smallest perturbation: `fab`, `fab_targeted`,
`deepfool`, `carlini_wagner`, `ead`, `lbfgs`, `jsma`, `ddn`, `fmn`, `sigma_zero`. By scores alone: `square`, `nes`,
`spsa`; by decisions alone: `boundary`, `hop_skip_jump`. One perturbation for all images: `universal`, `train_patch`.
Made of attacks: `worst_of`, `restarts`, `escalate`, `eight_bit`, `on_prediction`, `cascade`, `autoattack`.

Over several devices give them sharded rows, or call them inside `jax.shard_map` with ``check_vma=False``: no row waits
for another.
"""

from jaxnets.attacks.apgd import apgd, apgd_targeted
from jaxnets.attacks.autoattack import autoattack, plus, rand, standard
from jaxnets.attacks.boundary import boundary
from jaxnets.attacks.bpda import bpda
from jaxnets.attacks.carlini_wagner import carlini_wagner
from jaxnets.attacks.cascade import cascade
from jaxnets.attacks.checks import ModelWarning, black_box_wins, check_model
from jaxnets.attacks.combinators import eight_bit, escalate, restarts, worst_of
from jaxnets.attacks.ddn import ddn
from jaxnets.attacks.deepfool import deepfool
from jaxnets.attacks.diversity import diversified
from jaxnets.attacks.ead import ead
from jaxnets.attacks.estimated import nes, spsa
from jaxnets.attacks.fab import fab, fab_targeted, halfway
from jaxnets.attacks.fmn import fmn
from jaxnets.attacks.gradient import fgsm, pgd
from jaxnets.attacks.hop_skip_jump import hop_skip_jump
from jaxnets.attacks.iterated import (
    adam_pgd,
    bim,
    di_fgsm,
    iterated_least_likely_class,
    least_likely_class,
    mi_fgsm,
    ni_fgsm,
    ti_fgsm,
)
from jaxnets.attacks.jsma import jsma
from jaxnets.attacks.lbfgs import lbfgs
from jaxnets.attacks.parts.queries import Queried, counts_queries, with_queries
from jaxnets.attacks.parts.rules import (
    Rule,
    by_optax,
    gaussian_kernel,
    momentum,
    nesterov,
    normalized,
    smoothed,
    steepest,
)
from jaxnets.attacks.parts.start import at_clean, gaussian, random_signs, uniform, uniform_unclipped
from jaxnets.attacks.parts.stochastic import Stochastic
from jaxnets.attacks.patch import Placement, apply_patch, train_patch
from jaxnets.attacks.prediction import on_prediction
from jaxnets.attacks.sigma_zero import sigma_zero
from jaxnets.attacks.square import square
from jaxnets.attacks.transfer import ensemble
from jaxnets.attacks.universal import apply_universal, universal

__all__ = [
    "ModelWarning", "Placement", "Queried", "Rule", "Stochastic", "adam_pgd", "apgd", "apgd_targeted",
    "apply_patch", "apply_universal", "at_clean", "autoattack", "bim", "black_box_wins", "boundary", "bpda", "by_optax",
    "carlini_wagner", "cascade", "check_model", "counts_queries", "ddn", "deepfool", "di_fgsm", "diversified",
    "ead", "eight_bit", "ensemble", "escalate", "fab", "fab_targeted", "fgsm", "fmn", "gaussian", "gaussian_kernel",
    "halfway", "hop_skip_jump", "iterated_least_likely_class", "jsma", "lbfgs", "least_likely_class", "mi_fgsm",
    "momentum", "nes", "nesterov", "ni_fgsm", "normalized", "on_prediction", "pgd", "plus", "rand", "random_signs",
    "restarts", "sigma_zero", "smoothed", "spsa", "square", "standard", "steepest", "ti_fgsm", "train_patch", "uniform",
    "uniform_unclipped", "universal", "with_queries", "worst_of",
]  # fmt: skip
