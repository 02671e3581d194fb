"""Foolbox on the function in JAX, jitted."""

from collections.abc import Callable
from typing import Any

import foolbox
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import Loaded
from benchmarks.sides import foolbox_torch
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    attack, epsilon = foolbox_torch.attack_of(work), foolbox_torch.bound(work)
    model = foolbox.JAXModel(jax.jit(loaded.model), bounds=(0, 1))
    x, y = jnp.asarray(loaded.x), jnp.asarray(loaded.y)
    return lambda: np.asarray(attack(model, x, foolbox.criteria.Misclassification(y), epsilons=epsilon)[1])
