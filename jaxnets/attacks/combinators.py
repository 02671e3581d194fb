"""Attacks made of attacks: row by row the best of several, or of several starts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.tree_util import Partial

from jaxnets.attacks.calling import as_pytree, check_rows, checked_logits, row_keys
from jaxnets.attacks.ranking import Candidate, better, candidate, nothing_yet
from jaxnets.losses import is_targeted, margin, targeted
from jaxnets.types import Array, Attack, LogitsFn, Loss


def worst_of(*attacks: Attack, loss: Loss | None = None) -> Attack:
    """Runs every attack and keeps, row by row, the point that is worst for the model.

    Args:
      attacks: untargeted all, or targeted all.
      loss: what ranks two points that both succeed or both fail. Unless given it is the margin, whose sign says whether
        an attack succeeds, or the targeted margin where the attacks are targeted.

    Raises:
      ValueError: without attacks, or where some are targeted and others not and no ``loss`` is given.
    """
    if not attacks:
        raise ValueError("worst_of takes at least one attack, got none")
    return Combination(_worst_of, attacks, _common_goal(attacks) if loss is None else loss)


def restarts(attack: Attack, times: int, *, loss: Loss | None = None) -> Attack:
    """Runs an attack ``times`` times with different keys and keeps the worst point of each row, as `worst_of` does.

    A row that an earlier run fooled stays fooled: survivors never increase with ``times``.

    Args:
      attack: one with a random start.
      times: number of runs, at least 1.
      loss: as for `worst_of`.

    Raises:
      ValueError: for fewer than one run.
    """
    if times < 1:
        raise ValueError(f"restarts runs an attack at least once, got times={times}")
    return Combination(_restarts, (attack, times), _common_goal([attack]) if loss is None else loss)


@dataclass(frozen=True, eq=False)
class Combination:
    """An attack that jits ``run(key, logits_fn, x, target, loss, *parts)`` once and prints its parts."""

    run: Callable[..., Array]
    parts: tuple[Any, ...]
    loss: Loss

    def __call__(self, key: Array, logits_fn: LogitsFn, x: Array, target: Array, /) -> Array:
        check_rows(x, target)
        return self._jitted(key, as_pytree(logits_fn), x, target)

    @cached_property
    def _jitted(self):
        return jax.jit(lambda *arguments: self.run(*arguments, self.loss, *self.parts))

    def __repr__(self) -> str:
        return f"{self.run.__name__.lstrip('_')}({', '.join(map(repr, self.parts))})"


def _worst_of(key: Array, logits_fn: Partial, x: Array, target: Array, loss: Loss, *attacks: Attack) -> Array:
    keys = row_keys(key, len(x))
    best = nothing_yet(x)
    for number, attack in enumerate(attacks):
        best = _run(attack, number, keys, logits_fn, x, target, loss, best)
    return best.x


def _restarts(key: Array, logits_fn: Partial, x: Array, target: Array, loss: Loss, attack: Attack, times: int) -> Array:
    keys = row_keys(key, len(x))

    def again(number, best):
        return _run(attack, number, keys, logits_fn, x, target, loss, best)

    return jax.lax.fori_loop(0, times, again, nothing_yet(x)).x


def _run(attack: Attack, number: Any, keys: Array, logits_fn, x, target, loss: Loss, best: Candidate) -> Candidate:
    own_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
    x_adv = attack(own_keys, logits_fn, x, target)
    return better(best, candidate(loss, x_adv, checked_logits(logits_fn(x_adv), x), target))


def _common_goal(attacks) -> Loss:
    wanted = {is_targeted(_loss_of(attack)) for attack in attacks}
    if len(wanted) > 1:
        raise ValueError("targeted and untargeted attacks have no common goal: combine them apart, or pass loss=")
    return targeted(margin) if wanted.pop() else margin


def _loss_of(attack: Attack) -> Loss | None:
    return getattr(attack, "keywords", {}).get("loss") or getattr(attack, "loss", None)
