"""Attacks on the same weights by jaxnets and by a peer in PyTorch: how many rows survive, and in what time.

Command: ``python -m benchmarks.beside_peers`` after ``python -m benchmarks.networks``, with the extra ``peers``. Every
side runs in a process of its own, one after the other; times are of a first call, compilation included, and of a
second.

Found on two cores of an AMD EPYC with jax 0.10.2 and PyTorch 2.13.0, ``--rows 500 --calls 4`` (``--threat l2`` for cw,
``--calls 2`` for autoattack), key 0; seconds of the first call and the median of the others::

    small_cnn      jaxnets: first  others  survivors   torchattacks: first  others  survivors
    pgd-40                    2.0     0.4      93.8%                   1.1     0.8      93.2%
    apgd-100                  2.8     1.3      93.0%                   3.2     3.0      92.6%
    cw                        3.1     1.1      95.2%                   5.9     2.6      95.6%
    square-1000               9.7     4.6      90.8%                   7.2     6.2      90.6%
    autoattack               64.7    48.0      90.2%                 124.3   108.2      89.8%

Five first calls of autoattack took 59.5, 64.7, 53.5, 59.6 and 64.9 seconds, those of torchattacks after them 120.1,
124.3, 108.6, 107.3 and 131.7: 1.80 to 2.03 times as long; ten of our seconds are compilation.

Rows that survive, of 1,000, ``--rows 1000 --calls 1 --sides jaxnets official``. Official is that of
github.com/fra31/auto-attack, with the time for a seed::

                                small_cnn (0.3, 2, 10)    resnet18 (8/255, 0.5, 12)
                                jaxnets   official        jaxnets   official
    autoattack, linf              89.3%      89.4%          30.9%      31.0%
    autoattack, l2                22.1%      23.5%          45.0%      45.0%
    autoattack, l1                14.9%      15.2%          11.1%      11.3%
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

import jaxnets as jn
from benchmarks import networks

Side = Literal["jaxnets", "torchattacks", "official"]
EPSILONS = {
    "small_cnn": {"linf": 0.3, "l2": 2.0, "l1": 10.0},
    "resnet18": {"linf": 8 / 255, "l2": 0.5, "l1": 12.0},
}
THREATS = {"linf": jn.Linf, "l2": jn.L2, "l1": jn.L1}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Settings:
    """One attack on one network, side by side."""

    network: Literal["small_cnn", "resnet18"] = "small_cnn"
    threat: Literal["linf", "l2", "l1"] = "linf"
    attack: Literal["pgd-40", "apgd-100", "cw", "square-1000", "autoattack"] = "autoattack"
    """cw: Carlini-Wagner in L2 with one constant and 100 steps, all that torchattacks offers."""
    sides: tuple[Side, ...] = ("jaxnets", "torchattacks")
    """official is the AutoAttack of its authors, where it is installed; torchattacks has no L1."""
    rows: int = 1000
    calls: int = 2
    """The first compiles; only the first is counted for survivors."""
    data_dir: Path | None = None
    alone: bool = False
    """Run the one side in this process and print JSON."""


def main(settings: Settings) -> dict[str, dict[str, Any]]:
    print(f"{settings.attack} on {settings.network}, {settings.threat}, {settings.rows} rows", flush=True)
    found = {}
    for side in settings.sides:
        found[side] = _apart(settings, side)
        seconds = ", ".join(f"{value:.1f}" for value in found[side]["seconds"])
        print(f"{side:14} survivors {found[side]['survivors']:6.2%}   seconds {seconds}", flush=True)
    for side in found.keys() - {"jaxnets"} if "jaxnets" in found else ():
        pairs = zip(found[side]["seconds"], found["jaxnets"]["seconds"], strict=True)
        print(f"{side} takes {', '.join(f'{theirs / ours:.2f}' for theirs, ours in pairs)} times as long as jaxnets")
    return found


def _apart(settings: Settings, side: Side) -> dict[str, Any]:
    given = asdict(settings) | {"sides": None, "alone": None, "data_dir": None}
    options = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    place = ["--data-dir", str(settings.data_dir)] if settings.data_dir else []
    command = [sys.executable, "-m", "benchmarks.beside_peers", *options, *place, "--sides", side, "--alone"]
    # On small networks XLA's own kernels are up to twice as fast as YNNPACK's, which jax 0.10 prefers.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type="
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": flags})
    return json.loads(done.stdout.splitlines()[-1])


def alone(settings: Settings) -> dict[str, Any]:
    """One side's attack: survivors of the first call and the seconds of each."""
    warnings.simplefilter("ignore")
    model, twin, x, y = networks.load(settings.network, settings.data_dir)
    x, y = x[: settings.rows], np.asarray(y[: settings.rows], np.int64)
    right = np.argmax(model(x), axis=-1) == y
    side = SIDES[settings.sides[0]](settings, model, twin)
    seconds, survivors = [], 0.0
    for call in range(settings.calls):
        began = time.monotonic()
        x_adv = side(x, y)
        seconds.append(time.monotonic() - began)
        if call == 0:
            # Judged by one network for all sides; a row that is wrong without an attack has not survived.
            survivors = float((right & (np.argmax(model(x_adv), axis=-1) == y)).mean())
            epsilon = EPSILONS[settings.network][settings.threat]
            if settings.attack != "cw":
                jn.verification.verify(settings.sides[0], x_adv, x, THREATS[settings.threat](epsilon + 1e-5))
    return {"survivors": survivors, "seconds": seconds}


def _jaxnets(settings: Settings, model: Any, twin: Any) -> Callable[..., np.ndarray]:
    attacks, key = jn.attacks, jax.random.key(0)
    threat = THREATS[settings.threat](EPSILONS[settings.network][settings.threat])
    made: dict[str, Any] = {
        "pgd-40": partial(attacks.pgd, threat=threat, steps=40),
        "apgd-100": partial(attacks.apgd, threat=threat, steps=100),
        "cw": partial(attacks.carlini_wagner, threat=jn.L2(np.inf), steps=100, rounds=1, initial_const=1.0),
        "square-1000": partial(attacks.square, threat=threat, queries=1000),
        "autoattack": partial(attacks.autoattack, threat=threat),
    }
    attack = made[settings.attack]
    return lambda x, y: np.asarray(attack(key, model, jax.numpy.asarray(x), jax.numpy.asarray(y, np.int32)))


def _torchattacks(settings: Settings, model: Any, twin: Any) -> Callable[..., np.ndarray]:
    import torch
    import torchattacks

    net = twin().to(memory_format=torch.channels_last)
    norm, epsilon = NORMS[settings.threat], EPSILONS[settings.network][settings.threat]
    pgd = {
        "Linf": lambda: torchattacks.PGD(net, eps=epsilon, alpha=2.5 * epsilon / 40, steps=40),
        "L2": lambda: torchattacks.PGDL2(net, eps=epsilon, alpha=2.5 * epsilon / 40, steps=40),
    }
    made = {
        "pgd-40": lambda: pgd[norm](),
        "apgd-100": lambda: torchattacks.APGD(net, norm=norm, eps=epsilon, steps=100),
        "cw": lambda: torchattacks.CW(net, c=1, steps=100, lr=0.01),
        "square-1000": lambda: torchattacks.Square(net, norm=norm, eps=epsilon, n_queries=1000),
        "autoattack": lambda: _of_full_length(torchattacks.AutoAttack(net, norm=norm, eps=epsilon)),
    }
    attack = made[settings.attack]()
    return lambda x, y: _from_torch(attack(*_to_torch(x, y)))


def _of_full_length(autoattack: Any) -> Any:
    """torchattacks gives AutoAttack's gradient attacks 10 steps; the published suite has 100."""
    for attack in autoattack._autoattack.attacks:
        if hasattr(attack, "steps"):
            attack.steps = 100
    return autoattack


def _official(settings: Settings, model: Any, twin: Any) -> Callable[..., np.ndarray]:
    from autoattack import AutoAttack

    norm, epsilon = NORMS[settings.threat], EPSILONS[settings.network][settings.threat]
    attack = AutoAttack(twin(), norm=norm, eps=epsilon, version="standard", device="cpu", verbose=False)

    def run(x, y):
        images, classes = _to_torch(x, y)
        # It reshapes gradients by views, which those of channels-last images refuse.
        return _from_torch(attack.run_standard_evaluation(images.contiguous(), classes, bs=500))

    return run


def _to_torch(x: np.ndarray, y: np.ndarray) -> Any:
    import torch

    return torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(y)


def _from_torch(x_adv: Any) -> np.ndarray:
    return x_adv.detach().permute(0, 2, 3, 1).numpy()


SIDES = {"jaxnets": _jaxnets, "torchattacks": _torchattacks, "official": _official}

if __name__ == "__main__":
    chosen = tyro.cli(Settings)
    if chosen.alone:
        print(json.dumps(alone(chosen)))
    else:
        main(chosen)
