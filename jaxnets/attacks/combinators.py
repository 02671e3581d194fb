"""Attacks made of attacks: the best of several or of several starts, the first epsilon that does it, eight bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnets.attacks.parts.calling import as_pytree, check_rows, row_keys
from jaxnets.attacks.parts.queries import Queried, counts_queries, with_queries
from jaxnets.attacks.parts.ranking import Candidate, better, candidate, nothing_yet
from jaxnets.attacks.parts.stochastic import expected_logits, redrawn
from jaxnets.losses import is_targeted, margin, targeted
from jaxnets.threats import Threat, sizes
from jaxnets.types import Array, Attack, LogitsFn, Loss


def worst_of(*attacks: Attack, loss: Loss | None = None, nearest: Threat | None = None) -> Attack:
    """Runs every attack and keeps, row by row, the point that is worst for the model. Queries are not counted.

    Args:
      attacks: untargeted all, or targeted all.
      loss: what ranks two points that both succeed or both fail. Unless given it is the margin, whose sign says whether
        an attack succeeds, or the targeted margin where the attacks are targeted.
      nearest: for attacks that look for the smallest perturbation: a threat in whose norm, of two points that both
        succeed, the one nearer to the clean row is kept.

    Raises:
      ValueError: without attacks, or where some are targeted and others not and no ``loss`` is given.
    """
    if not attacks:
        raise ValueError("worst_of takes at least one attack, got none")
    return Combination(_worst_of, attacks, _common_goal(attacks) if loss is None else loss, nearest)


def restarts(
    attack: Attack, times: int, *, at_once: int = 1, loss: Loss | None = None, nearest: Threat | None = None
) -> Attack:
    """Runs an attack ``times`` times with different keys and keeps the worst point of each row, as `worst_of` does.

    A row that an earlier run fooled stays fooled: survivors never increase with ``times``.

    Args:
      attack: one with a random start.
      times: number of runs, at least 1.
      at_once: runs that share a call, along an axis beside that of the rows: as many as memory allows. The result is
        the same. Where it does not divide ``times``, the last call repeats a run.
      loss, nearest: as for `worst_of`.

    Raises:
      ValueError: for fewer than one run, in all or at once.
    """
    if times < 1 or at_once < 1:
        raise ValueError(f"restarts runs an attack at least once, got times={times}, at_once={at_once}")
    return Combination(_restarts, (attack, times, at_once), _common_goal([attack]) if loss is None else loss, nearest)


def escalate(
    attack: Callable[..., Array], threat: Threat, epsilons: Sequence[float], *, loss: Loss | None = None
) -> Attack:
    """Attacks under rising epsilons, each row up to the first at which it breaks, and returns its example from there.

    A row that is wrong as it is comes back as it is, and one that no epsilon breaks at its worst point found. A broken
    row keeps its point, whatever larger epsilons find, and no epsilon is tried once all are broken.

    Args:
      attack: ``(key, logits_fn, x, target, *, threat) -> x_adv``, an attack without its threat:
        ``partial(pgd, steps=40)``.
      threat: the norm and the box; its own epsilon is replaced.
      epsilons: rising.
      loss: as for `worst_of`.

    Raises:
      ValueError: without epsilons, or where they do not rise.

    >>> import jaxnets as jn
    >>> attack = escalate(jn.attacks.fgsm, jn.Linf(0.0), [0.1, 0.2, 0.3])
    >>> x, y = jnp.array([[0.5, 0.2], [0.4, 0.5]]), jnp.array([0, 0])
    >>> print(attack(jax.random.key(0), lambda x: x, x, y))
    [[0.3 0.4]
     [0.4 0.5]]
    """
    rising = np.asarray(epsilons, np.float64)
    if rising.ndim != 1 or len(rising) < 1 or not (np.diff(rising) > 0).all() or not (rising >= 0).all():
        raise ValueError(f"escalate takes rising epsilons of at least 0, at least one, got {epsilons}")
    goal = _common_goal([attack]) if loss is None else loss
    return Combination(_escalate, (attack, threat, tuple(rising.tolist())), goal)


def eight_bit(attack: Attack) -> Attack:
    """An attack whose examples are whole multiples of 1/255, as image files hold them.

    Every coordinate goes from where the attack left it towards the clean row, up to the first multiple; where there is
    none on the way it stays clean. So no perturbation grows, whatever its norm; one that only just succeeds, as those
    of minimum-norm attacks do, may fail for it.

    Args:
      attack: on data in [0, 1]. Its queries are counted as before.

    >>> import jaxnets as jn
    >>> x, y = jnp.array([[100, 50]]) / 255, jnp.array([0])
    >>> attack = eight_bit(Partial(jn.attacks.fgsm, threat=jn.Linf(8.7 / 255)))
    >>> print((attack(jax.random.key(0), lambda x: x, x, y) * 255).round().astype(int))
    [[92 58]]
    """
    counting = with_queries(attack)

    @wraps(attack)
    def rounded(key: Array, logits_fn: LogitsFn, x: Array, target: Array) -> Array:
        return _to_eight_bits(attack(key, logits_fn, x, target), x)

    @wraps(attack)
    def rounded_with_queries(key: Array, logits_fn: LogitsFn, x: Array, target: Array) -> Queried:
        found, queries = counting(key, logits_fn, x, target)  # pyright: ignore
        return Queried(_to_eight_bits(found, x), queries)

    return rounded if counting is None else counts_queries(rounded_with_queries)


@jax.jit
def _to_eight_bits(x_adv: Array, x: Array) -> Array:
    # What a rounding error keeps from being a whole number is one.
    down, up = jnp.floor(255 * x_adv + 1e-4) / 255, jnp.ceil(255 * x_adv - 1e-4) / 255
    return jnp.where(x_adv > x, jnp.maximum(down, x), jnp.where(x_adv < x, jnp.minimum(up, x), x))


@dataclass(frozen=True, eq=False)
class Combination:
    """An attack that jits ``run(key, logits_fn, x, target, (loss, nearest), *parts)`` once and prints its parts."""

    run: Callable[..., Array]
    parts: tuple[Any, ...]
    loss: Loss
    nearest: Threat | None = None

    def __call__(self, key: Array, logits_fn: LogitsFn, x: Array, target: Array, /) -> Array:
        check_rows(x, target)
        return self._jitted(key, as_pytree(logits_fn), x, target)

    @cached_property
    def _jitted(self):
        return jax.jit(lambda *arguments: self.run(*arguments, (self.loss, self.nearest), *self.parts))

    def __repr__(self) -> str:
        return f"{self.run.__name__.lstrip('_')}({', '.join(map(repr, self.parts))})"


def _worst_of(key: Array, logits_fn: Partial, x: Array, target: Array, ranking, *attacks: Attack) -> Array:
    keys = row_keys(key, len(x))
    judge = _judge(logits_fn, keys, len(attacks), x, target, ranking)
    best = nothing_yet(x)
    for number, attack in enumerate(attacks):
        own_keys = _run_keys(keys, number)
        best = better(best, judge(attack(own_keys, redrawn(logits_fn, own_keys, 0), x, target)))
    return best.x


def _restarts(key, logits_fn: Partial, x: Array, target: Array, ranking, attack: Attack, times: int, at_once: int):
    keys = row_keys(key, len(x))
    judge = _judge(logits_fn, keys, times, x, target, ranking)

    def run(number):
        own_keys = _run_keys(keys, number)
        return judge(attack(own_keys, redrawn(logits_fn, own_keys, 0), x, target))

    def again(call, best):
        numbers = jnp.minimum(call * at_once + jnp.arange(at_once), times - 1)
        found = jax.vmap(run)(numbers)
        for number in range(at_once):
            best = better(best, jax.tree.map(lambda leaf: leaf[number], found))  # noqa: B023
        return best

    def one(number, best):
        return better(best, run(number))

    if at_once == 1:
        return jax.lax.fori_loop(0, times, one, nothing_yet(x)).x
    return jax.lax.fori_loop(0, -(-times // at_once), again, nothing_yet(x)).x


def _escalate(key, logits_fn: Partial, x: Array, target: Array, ranking, attack, threat: Any, epsilons) -> Array:
    keys, values = row_keys(key, len(x)), jnp.asarray(epsilons)
    judge = _judge(logits_fn, keys, len(epsilons), x, target, ranking)

    def harder(carry):
        number, held = carry
        own_keys = _run_keys(keys, number)
        wider = replace(threat, epsilon=values[number])
        x_adv = attack(own_keys, redrawn(logits_fn, own_keys, 0), x, target, threat=wider)
        return number + 1, better(held, judge(x_adv), among=~held.success)

    def unfinished(carry):
        number, held = carry
        return (number < len(epsilons)) & ~jnp.all(held.success)

    return jax.lax.while_loop(unfinished, harder, (0, better(nothing_yet(x), judge(x))))[1].x


def _run_keys(keys: Array, number: Any) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def _judge(
    logits_fn: LogitsFn, keys: Array, runs: int, x: Array, target: Array, ranking: tuple[Loss, Threat | None]
) -> Callable[[Array], Candidate]:
    """What ranks the points of ``runs`` runs. A model that draws does so alike for all, and as in none of them."""
    judging, (loss, nearest) = redrawn(logits_fn, keys, runs), ranking

    def judge(x_adv):
        found = candidate(loss, x_adv, expected_logits(judging, x_adv), target)
        if nearest is None:
            return found
        return found._replace(loss=jnp.where(found.success, -sizes(nearest, x_adv, x), found.loss))

    return judge


def _common_goal(attacks) -> Loss:
    wanted = {is_targeted(_loss_of(attack)) for attack in attacks}
    if len(wanted) > 1:
        raise ValueError("targeted and untargeted attacks have no common goal: combine them apart, or pass loss=")
    return targeted(margin) if wanted.pop() else margin


def _loss_of(attack: Attack) -> Loss | None:
    """The loss that an attack was bound to, under `jax.jit` and other wrappers too."""
    said = getattr(attack, "keywords", {}).get("loss") or getattr(attack, "loss", None)
    inner = getattr(attack, "__wrapped__", None) or getattr(attack, "func", None)
    return _loss_of(inner) if said is None and inner is not None else said
