"""Objectives: what training lowers, ``(params, stats, batch, key) -> (scalar, (stats, metrics))``.

On rows as they are `standard` and `auxiliary`. On attacked rows `adversarial`, in one step `fast` and `n_fgsm`, with
clean rows beside them `kurakin`, `ensemble_adversarial`, `trades` and `mart`. Without labels `virtual_adversarial`. On
bounds of what any attack can do `ibp` and `crown_ibp`. Around another objective `awp`, `grad_align` and `augmented`.
Free adversarial training is a step, `training.make_free_step`, and so is what changes as training goes on,
`training.scheduled`.

Those with an attack are a `MinMax`: the attack, in inference mode, touches neither parameters nor statistics. Which
batch then moves the batch statistics is an argument, a function of `statistics`. Metrics are the ``loss``, the
``accuracy`` on the rows as the attack leaves them, and the ``clean_accuracy`` where clean rows pass too.
"""

from jaxnets.objectives import statistics
from jaxnets.objectives.adversarial import adversarial
from jaxnets.objectives.augmented import augmented
from jaxnets.objectives.auxiliary import auxiliary
from jaxnets.objectives.awp import awp
from jaxnets.objectives.certified import crown_ibp, ibp
from jaxnets.objectives.ensemble_adversarial import ensemble_adversarial
from jaxnets.objectives.fast import fast, n_fgsm
from jaxnets.objectives.grad_align import grad_align
from jaxnets.objectives.kurakin import kurakin
from jaxnets.objectives.mart import mart
from jaxnets.objectives.minmax import MinMax
from jaxnets.objectives.standard import standard
from jaxnets.objectives.trades import trades
from jaxnets.objectives.virtual_adversarial import virtual_adversarial

__all__ = [
    "MinMax", "adversarial", "augmented", "auxiliary", "awp", "crown_ibp", "ensemble_adversarial", "fast", "grad_align",
    "ibp", "kurakin", "mart", "n_fgsm", "standard", "statistics", "trades", "virtual_adversarial",
]  # fmt: skip
