"""What is timed: attacks and steps of training, the same for every side."""

import re
from typing import Literal, NamedTuple, cast

Precision = Literal["float32", "tf32", "bf16"]
"""What networks compute in; attacks compute in float32. The two others mean something on GPUs alone."""

_ON_DIGITS = {"linf": 0.3, "l2": 2.0, "l1": 10.0}
_ON_COLOURS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
EPSILONS = {
    "small_cnn": _ON_DIGITS,
    "madry_cnn": _ON_DIGITS,
    "resnet18_8": _ON_COLOURS,
    "resnet18_16": _ON_COLOURS,
    "resnet18_64": _ON_COLOURS,
    "wrn28_10": _ON_COLOURS,
}
"""By network of `benchmarks.networks`, and norm."""


class Work(NamedTuple):
    """So many rows of one network, attacked or trained on once.

    Attributes:
      network: of `benchmarks.networks`.
      method: ``pgd``, ``apgd``, ``cw`` (one constant), ``square``, ``autoattack``; or to train, a step of SGD each:
        ``train-pgd``, ``train-trades``, ``train-fgsm`` (FGSM-RS).
      steps: of the attack; queries of ``square``; 0 where the method knows them.
      norm: ``linf``, ``l2`` or ``l1``.
      rows: at once.
      precision: of the network.
    """

    network: str
    method: str
    steps: int
    norm: str
    rows: int
    precision: Precision = "float32"

    def __str__(self) -> str:
        steps = f"-{self.steps}" if self.steps else ""
        precision = "" if self.precision == "float32" else f" {self.precision}"
        return f"{self.network} {self.method}{steps} {self.norm} {self.rows}{precision}"

    @property
    def epsilon(self) -> float:
        return EPSILONS[self.network][self.norm]

    @property
    def step_size(self) -> float:
        """Of PGD: 2.5 epsilon over its steps; of FGSM-RS: 1.25 epsilon."""
        return 1.25 * self.epsilon if self.method == "train-fgsm" else 2.5 * self.epsilon / self.steps

    @property
    def trains(self) -> bool:
        return self.method.startswith("train-")


def parse(said: str) -> Work:
    """The work that ``str`` gives.

    >>> parse("small_cnn pgd-40 linf 512")
    Work(network='small_cnn', method='pgd', steps=40, norm='linf', rows=512, precision='float32')
    """
    found = re.fullmatch(r"(\S+) (\S+?)(?:-(\d+))? (linf|l2|l1) (\d+)(?: (tf32|bf16))?", said)
    if not found or found[1] not in EPSILONS:
        raise ValueError(
            "work is said as 'small_cnn pgd-40 linf 512', with tf32 or bf16 behind it for less than float32, got "
            f"{said!r}; networks: {', '.join(EPSILONS)}"
        )
    return Work(found[1], found[2], int(found[3] or 0), found[4], int(found[5]), cast(Precision, found[6] or "float32"))


def on(network: str, rows: int | str, *works: str) -> list[Work]:
    return [parse(f"{network} {work} {rows}") for work in works]


PGD = ("pgd-10 linf", "pgd-40 linf", "pgd-10 l2", "pgd-40 l2")
TRAINING = ("train-pgd-7 linf", "train-trades-10 linf", "train-fgsm linf")
ON_CPU = [
    *on("small_cnn", 512, *PGD, "apgd-100 linf", "cw-100 l2", "square-1000 linf", *TRAINING),
    *on("small_cnn", 256, "autoattack linf"),
    *on("madry_cnn", 128, *PGD, "apgd-100 linf", "cw-100 l2", *TRAINING),
    *on("resnet18_16", 64, *PGD, "apgd-100 linf", *TRAINING),
    *on("resnet18_64", 16, "pgd-10 linf", "pgd-10 l2", *TRAINING),
]
"""Minutes a side on two cores. Attacks that stop where a row has fallen run on networks that were trained."""

ON_GPU = [
    *on("madry_cnn", 512, "pgd-40 linf", "train-pgd-7 linf"),
    *on("resnet18_64", 512, "pgd-10 linf", "train-pgd-10 linf", "train-fgsm linf"),
    *on("resnet18_64", "512 tf32", "pgd-10 linf", "train-pgd-10 linf", "train-fgsm linf"),
    *on("resnet18_64", "512 bf16", "pgd-10 linf", "pgd-10 l2", "apgd-100 linf", *TRAINING, "train-pgd-10 linf"),
    *on("wrn28_10", "256 bf16", "pgd-10 linf", "train-pgd-10 linf"),
    *on("wrn28_10", "500 tf32", "autoattack linf"),
    *on("wrn28_10", "500 bf16", "autoattack linf"),
]
"""Not run yet. ``wrn28_10 autoattack linf 10000 bf16`` takes the sides beside ours hours."""
