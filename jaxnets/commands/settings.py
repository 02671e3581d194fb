"""What `jaxnets train` was asked: what is left unsaid filled in, what cannot be refused, several networks told apart.

Nothing here knows an attack, so that `verify` can use it.
"""

import dataclasses
from typing import Any, NamedTuple

from jaxnets.cli import Train


class Traits(NamedTuple):
    """What an objective has, and what it takes.

    Attributes:
      beta: the weight of its second term unless given; None where there is no such term.
      start: where its attack starts unless said.
      steps: of its attack unless given.
      of_classes: its labels are classes, neither smoothed nor mixed.
      certifies: it bounds what its threat can do, and so does the report.
      takes: those of ``attack``, ``steps`` and ``start`` that change it.
      in_a_threat: its threat, and so epsilon, changes the training.
    """

    beta: float | None = None
    start: str = "uniform"
    steps: int = 10
    of_classes: bool = False
    certifies: bool = False
    takes: tuple[str, ...] = ()
    in_a_threat: bool = True

    @property
    def attacks(self) -> bool:
        """By the attack of a name, --attack."""
        return "attack" in self.takes


_AN_ATTACK = ("attack", "steps", "start")

TRAITS = {
    "standard": Traits(in_a_threat=False),
    "adversarial": Traits(takes=_AN_ATTACK),
    "fast": Traits(takes=("start",)),
    "n_fgsm": Traits(),
    "grad_align": Traits(beta=0.2, takes=("start",)),
    "free": Traits(steps=8, takes=("steps",)),
    "trades": Traits(beta=6.0, start="gaussian", takes=_AN_ATTACK),
    "mart": Traits(beta=6.0, start="gaussian", of_classes=True, takes=_AN_ATTACK),
    "kurakin": Traits(),
    "virtual_adversarial": Traits(beta=1.0),
    "ensemble_adversarial": Traits(takes=_AN_ATTACK),
    "auxiliary": Traits(in_a_threat=False),
    "ibp": Traits(of_classes=True, certifies=True),
    "crown_ibp": Traits(of_classes=True, certifies=True),
}


@dataclasses.dataclass(frozen=True)
class Settled(Train):
    """A training whose every number is known."""

    epochs: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    start: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def replays(self) -> int:
        """Updates of the weights a batch."""
        return self.steps if self.objective == "free" else 1

    @property
    def is_several(self) -> bool:
        """Whether more than one network is asked for."""
        return self.seeds > 1 or self.sweep is not None


def settle(command: Train) -> Settled:
    """What depends on the objective and the data, filled in: few small images bear many passes and a high rate.

    Raises:
      ValueError: for wishes that no training can fulfil.
    """
    if command.sweep and getattr(command, command.sweep) not in (None, getattr(Train, command.sweep)):
        raise ValueError(f"--{_dashed(command.sweep)} is swept: say its values with --values alone")
    traits, is_small = TRAITS[command.objective], command.data == "digits"
    given = {name: value for name, value in dataclasses.asdict(command).items() if value is not None}
    steps, passes = given.get("steps", traits.steps), 100 if is_small else 10
    defaults = {
        "epochs": max(1, passes // max(1, steps)) if command.objective == "free" else passes,
        "learning_rate": 1e-2 if is_small else 1e-3,
        "steps": steps,
        "start": traits.start,
        "beta": traits.beta,
    }
    settled = Settled(**{**defaults, **given})
    _check_several(settled)
    for member in members(settled).values():
        _check(member)
    return settled


def check_taken(command: Train) -> None:
    """Raises ValueError for a wish about the attack that the objective would not hear."""
    said = {"attack": command.attack != Train.attack, "steps": command.steps, "start": command.start}
    for option in (name for name, value in said.items() if value):
        if option not in TRAITS[command.objective].takes:
            takers = ", ".join(name for name, traits in TRAITS.items() if option in traits.takes)
            raise ValueError(f"--{option} changes nothing in {command.objective}, only in {takers}: leave it out")
    if command.attack == "fgsm" and command.steps:
        raise ValueError("--attack fgsm is one step: leave out --steps, or take pgd")


def members(command: Settled) -> dict[str, Settled]:
    """The networks that are asked for, by name, each as if asked for alone."""

    def alone(seed: int, changes: dict[str, Any]) -> Settled:
        return dataclasses.replace(command, seed=seed, seeds=1, sweep=None, values=(), **changes)

    seeds = range(command.seed, command.seed + command.seeds)
    if command.sweep is None:
        return {f"seed{seed}": alone(seed, {}) for seed in seeds}
    return {
        f"{command.sweep}{value:g}-seed{seed}": alone(seed, {command.sweep: value})
        for value in command.values
        for seed in seeds
    }


def check_at_least(command: Any, **least: float) -> None:
    """Raises ValueError unless each of these is a number from its bound on, of 32 bits as on devices."""
    for name, bound in least.items():
        value = getattr(command, name)
        if not bound <= value < float("inf"):
            raise ValueError(f"--{_dashed(name)} must be a number from {bound} on, got {value}")
        largest = 2**31 - 1 if isinstance(value, int) else 3.4e38
        if value > largest:
            raise ValueError(f"--{_dashed(name)} must be at most {largest:g}, got {value:g}")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")


def _check(command: Settled) -> None:
    check_at_least(command, epsilon=0, steps=1, epochs=1, batch_size=1, weight_decay=0, evaluate_every=1, examples=1)
    check_at_least(command, held_out=0)
    if not 0 < command.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be above 0, got {command.learning_rate}")
    if not 0 <= command.label_smoothing < 1:
        raise ValueError(f"--label-smoothing must be at least 0 and below 1, got {command.label_smoothing}")
    check_seed(command.seed)
    if command.ema is not None and not 0 <= command.ema < 1:
        raise ValueError(f"--ema must be at least 0 and below 1, got {command.ema}")
    _check_stopping(command)
    _check_objective(command)


def _check_stopping(command: Settled) -> None:
    if command.patience is None:
        return
    check_at_least(command, patience=1)
    if not command.held_out:
        raise ValueError("--patience counts looks at held-out rows: say how many rows with --held-out")


def _check_objective(command: Settled) -> None:
    name, traits = command.objective, TRAITS[command.objective]
    for option in ("beta", "awp"):
        if getattr(command, option) is not None:
            check_at_least(command, **{option: 0})
    if command.beta is not None and traits.beta is None:
        weighted = ", ".join(other for other, of in TRAITS.items() if of.beta is not None)
        raise ValueError(f"--beta is a weight in {weighted}: {name} has none")
    if command.awp is not None and name == "free":
        raise ValueError("--awp takes the weights of one pass, free updates them in each: leave one of the two")
    if name == "trades" and command.start == "at_clean":
        raise ValueError("--start at_clean: there the divergence of trades has no gradient, take another")
    if traits.certifies and command.model == "vit_small":
        raise ValueError(f"{name} finds no finite bounds through attention: take another --model than vit_small")
    if bool(command.sources) != (name == "ensemble_adversarial"):
        raise ValueError(f"--sources are the runs that ensemble_adversarial attacks: give both or neither, not {name}")
    if name == "auxiliary" and not command.model.startswith("googlenet"):
        raise ValueError(f"auxiliary trains the heads of googlenet and googlenet_bn: {command.model} has none")
    mixed = [one for one in command.augment if one in ("mixup", "cutmix")]
    if traits.of_classes and (mixed or command.label_smoothing):
        wish = f"--augment {mixed[0]}" if mixed else "--label-smoothing"
        raise ValueError(f"{name} takes classes as labels, no probabilities: leave out {wish}")


def _check_several(command: Settled) -> None:
    check_at_least(command, seeds=1)
    if bool(command.values) != (command.sweep is not None):
        raise ValueError("--sweep says what --values are of: give both or neither")
    if len(members(command)) < len(command.values) * command.seeds:
        raise ValueError(f"--values must differ in their first six digits, got {command.values}")
    if command.patience is not None and command.is_several:
        raise ValueError("--patience ends one training: networks that are trained together end together")
    if command.sweep == "epsilon" and not TRAITS[command.objective].in_a_threat:
        raise ValueError(f"--sweep epsilon: {command.objective} trains the same network for every epsilon")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
