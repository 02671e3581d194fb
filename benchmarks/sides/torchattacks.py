"""torchattacks, and steps of training with its attacks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchattacks
from torch.nn import functional
from torch.optim import SGD

from benchmarks.networks import Loaded
from benchmarks.sides import NORMS, NotOfferedError, from_torch, frozen, to_torch, wait_for_torch
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    x, y = to_torch(loaded.x, loaded.y)
    norm, epsilon = NORMS[work.norm], work.epsilon
    if work.norm == "l1":
        raise NotOfferedError(work.norm)
    pgd = torchattacks.PGD if work.norm == "linf" else torchattacks.PGDL2
    made: dict[str, Callable[[Any], Any]] = {
        "pgd": lambda net: pgd(net, eps=epsilon, alpha=work.step_size, steps=work.steps),
        "apgd": lambda net: torchattacks.APGD(net, norm=norm, eps=epsilon, steps=work.steps),
        "cw": lambda net: torchattacks.CW(net, c=1, steps=work.steps, lr=0.01),
        "square": lambda net: torchattacks.Square(net, norm=norm, eps=epsilon, n_queries=work.steps),
        "autoattack": lambda net: _of_full_length(torchattacks.AutoAttack(net, norm=norm, eps=epsilon)),
        "train-pgd": lambda net: pgd(net, eps=epsilon, alpha=work.step_size, steps=work.steps),
        "train-fgsm": lambda net: torchattacks.FFGSM(net, eps=epsilon, alpha=work.step_size),
        "train-trades": lambda net: torchattacks.TPGD(net, eps=epsilon, alpha=work.step_size, steps=work.steps),
    }
    if work.method not in made:
        raise NotOfferedError(work.method)
    if work.trains:
        return _training(work, made[work.method], loaded, x, y)
    net = frozen(loaded.twin)
    if work.norm == "l2":
        # PGDL2 reshapes gradients by views, which those of channels-last images refuse.
        net, x = net.to(memory_format=torch.contiguous_format), x.contiguous()
    attack = made[work.method](net)
    return lambda: from_torch(attack(x, y))


def _of_full_length(autoattack: Any) -> Any:
    """torchattacks gives AutoAttack's gradient attacks 10 steps; the published suite has 100."""
    for attack in autoattack._autoattack.attacks:
        if hasattr(attack, "steps"):
            attack.steps = 100
    return autoattack


def _training(work: Work, attack_of: Callable[[Any], Any], loaded: Loaded, x: Any, y: Any) -> Callable[[], None]:
    net = loaded.twin().to(memory_format=torch.channels_last).train()
    attack, optimizer = attack_of(net), SGD(net.parameters(), lr=0.01, momentum=0.9)
    lowered = _trades if work.method == "train-trades" else _adversarial

    def step() -> None:
        loss = lowered(net, attack(x, y), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait_for_torch()

    return step


def _adversarial(net: Any, x_adv: Any, x: Any, y: Any) -> Any:
    return functional.cross_entropy(net(x_adv), y)


def _trades(net: Any, x_adv: Any, x: Any, y: Any) -> Any:
    logits, divergence = net(x), partial(functional.kl_div, reduction="batchmean", log_target=True)
    return functional.cross_entropy(logits, y) + 6 * divergence(net(x_adv).log_softmax(1), logits.log_softmax(1))
