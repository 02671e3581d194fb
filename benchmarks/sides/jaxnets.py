"""jaxnets itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from benchmarks.networks import Loaded
from benchmarks.sides import NORMS, NotOfferedError
from benchmarks.work import Work
from jaxnets import attacks, objectives
from jaxnets.types import Batch


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    return _training(work, loaded) if work.trains else _attack(work, loaded)


def _threat(work: Work) -> Any:
    return getattr(jn, NORMS[work.norm])(work.epsilon)


def _attack(work: Work, loaded: Loaded) -> Callable[[], Any]:
    threat = _threat(work)
    made: dict[str, Callable[..., Any]] = {
        "pgd": partial(attacks.pgd, threat=threat, steps=work.steps, start=attacks.uniform),
        "apgd": partial(attacks.apgd, threat=threat, steps=work.steps),
        "cw": partial(attacks.carlini_wagner, threat=jn.L2(np.inf), steps=work.steps, rounds=1, initial_const=1.0),
        "square": partial(attacks.square, threat=threat, queries=work.steps),
        "autoattack": partial(attacks.autoattack, threat=threat),
    }
    if work.method not in made:
        raise NotOfferedError(work.method)
    attack, model, key = made[work.method], loaded.model, jax.random.key(0)
    x, y = jnp.asarray(loaded.x), jnp.asarray(loaded.y)
    return lambda: np.asarray(attack(key, model, x, y))


def _training(work: Work, loaded: Loaded) -> Callable[[], Any]:
    net, threat = loaded.net, _threat(work)
    pgd = partial(attacks.pgd, threat=threat, steps=work.steps)
    made: dict[str, Callable[[], Any]] = {
        "train-pgd": lambda: objectives.adversarial(net, partial(pgd, start=attacks.uniform)),
        "train-trades": lambda: objectives.trades(net, partial(pgd, start=attacks.gaussian(1e-3))),
        "train-fgsm": lambda: objectives.fast(net, threat, start=attacks.uniform),
    }
    optimizer, batch = optax.sgd(0.01, momentum=0.9), Batch(jnp.asarray(loaded.x), jnp.asarray(loaded.y))
    step = jax.jit(jn.training.make_step(made[work.method](), optimizer), donate_argnums=0)
    # A copy, for the step writes into what it is given.
    params, stats = jax.tree.map(jnp.array, (loaded.params, loaded.stats))
    state = jn.training.init_state(jax.random.key(0), params, stats, optimizer)
    # All on one device by name, as what a step gives of restored weights is: else the second call compiles again.
    kept = [jax.device_put(state, jax.devices()[0])]

    def once() -> None:
        kept[0], _ = jax.block_until_ready(step(kept[0], batch))

    return once
