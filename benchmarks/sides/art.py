"""The Adversarial Robustness Toolbox on the network in PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier

from benchmarks.networks import Loaded
from benchmarks.sides import ORDERS, NotOfferedError, frozen, torch_device
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    shared = {"norm": ORDERS[work.norm], "eps": work.epsilon, "batch_size": work.rows}
    made: dict[str, Callable[[Any], Any]] = {
        "pgd": lambda net: evasion.ProjectedGradientDescentPyTorch(
            net, eps_step=work.step_size, max_iter=work.steps, num_random_init=1, verbose=False, **shared
        ),
        "apgd": lambda net: evasion.AutoProjectedGradientDescent(
            net, eps_step=2 * work.epsilon, max_iter=work.steps, nb_random_init=1, loss_type="cross_entropy",
            verbose=False, **shared,
        ),
        "cw": lambda net: evasion.CarliniL2Method(
            net, binary_search_steps=1, max_iter=work.steps, initial_const=1.0, batch_size=work.rows, verbose=False
        ),
        "square": lambda net: evasion.SquareAttack(net, max_iter=work.steps, verbose=False, **shared),
    }  # fmt: skip
    if work.method not in made:
        raise NotOfferedError(work.method)
    classifier = PyTorchClassifier(
        frozen(loaded.twin),
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(loaded.x.shape[3], *loaded.x.shape[1:3]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if torch_device() == "cuda" else "cpu",
    )
    attack, x = made[work.method](classifier), np.ascontiguousarray(loaded.x.transpose(0, 3, 1, 2))
    return lambda: attack.generate(x, loaded.y).transpose(0, 2, 3, 1)
