"""The loop that a careful user writes in PyTorch: parameters frozen while attacking, channels-last, nothing besides."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.networks import Loaded
from benchmarks.sides import NotOfferedError, from_torch, frozen, to_torch, wait_for_torch
from benchmarks.work import Work


def make(work: Work, loaded: Loaded, *, prepared: Callable[[Any], Any] = lambda net: net) -> Callable[[], Any]:
    """``prepared`` is what is done to the network first."""
    x, y = to_torch(loaded.x, loaded.y)
    if work.trains:
        return _training(work, prepared(loaded.twin().to(memory_format=torch.channels_last)), x, y)
    made: dict[str, Callable[..., torch.Tensor]] = {
        "pgd": partial(_pgd, work, _cross_entropy),
        "cw": partial(_cw, work),
    }
    if work.method not in made:
        raise NotOfferedError(work.method)
    net = prepared(frozen(loaded.twin))
    return lambda: from_torch(made[work.method](net, x, y))


def _cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, y, reduction="sum")


def _divergence(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="sum", log_target=True)


def _pgd(work: Work, loss: Any, net: Any, x: torch.Tensor, target: torch.Tensor, start: float = 1.0) -> torch.Tensor:
    """From a point of the ball, drawn within the share ``start`` of its radius."""
    move, project = (_linf_step, _linf_project) if work.norm == "linf" else (_l2_step, _l2_project)
    delta = torch.empty_like(x).uniform_(-1, 1) * work.epsilon * start
    x_adv = (x + project(delta, work.epsilon)).clamp_(0, 1)
    for _ in range(max(work.steps, 1)):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(net(x_adv), target), x_adv)
        with torch.no_grad():
            delta = project(x_adv + move(gradient, work.step_size) - x, work.epsilon)
            x_adv = (x + delta).clamp_(0, 1)
    return x_adv


def _linf_step(gradient: torch.Tensor, size: float) -> torch.Tensor:
    return gradient.sign_().mul_(size)


def _linf_project(delta: torch.Tensor, epsilon: float) -> torch.Tensor:
    return delta.clamp_(-epsilon, epsilon)


def _l2_step(gradient: torch.Tensor, size: float) -> torch.Tensor:
    return gradient.mul_(size / _lengths(gradient).clamp_min_(1e-12))


def _l2_project(delta: torch.Tensor, epsilon: float) -> torch.Tensor:
    return delta.mul_((epsilon / _lengths(delta).clamp_min_(1e-12)).clamp_max_(1))


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(1).norm(dim=1)[:, None, None, None]


def _cw(work: Work, net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One constant of 1: Adam on the point before the tanh; the nearest point of another class is kept."""
    before = torch.atanh((2 * x - 1).clamp(-1 + 1e-6, 1 - 1e-6)).requires_grad_()
    optimizer = torch.optim.Adam([before], lr=0.01)
    best, nearest = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    own = functional.one_hot(y, 10).bool()
    for _ in range(work.steps):
        x_adv = (torch.tanh(before) + 1) / 2
        logits = net(x_adv)
        distance = (x_adv - x).flatten(1).square().sum(1)
        lead = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
        optimizer.zero_grad()
        (distance + lead.clamp_min(0)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            better = (lead < 0) & (distance < nearest)
            nearest = torch.where(better, distance, nearest)
            best = torch.where(better[:, None, None, None], x_adv, best)
    return best


def _training(work: Work, net: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    once = {"train-pgd": _adversarial, "train-fgsm": _adversarial, "train-trades": _trades}[work.method]

    def step() -> None:
        loss = once(work, net, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait_for_torch()

    return step


def _adversarial(work: Work, net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x_adv = _attacked(net, partial(_pgd, work, _cross_entropy, net, x, y))
    return functional.cross_entropy(net(x_adv), y)


def _trades(work: Work, net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        clean = net.eval()(x)
    x_adv = _attacked(net, partial(_pgd, work, _divergence, net, x, clean, start=1e-3))
    logits, attacked = net(x), net(x_adv)
    return functional.cross_entropy(logits, y) + 6 / len(x) * _divergence(attacked, logits)


def _attacked(net: Any, attack: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the attack gives in inference mode, with frozen parameters."""
    net.eval().requires_grad_(False)
    x_adv = attack().detach()
    net.train().requires_grad_(True)
    return x_adv
