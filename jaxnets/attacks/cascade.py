"""Attacks one after the other, each on the rows that survived those before: the shape of AutoAttack."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from jaxnets import parallel
from jaxnets.attacks.parts.calling import check_rows
from jaxnets.attacks.parts.on_host import attack_rows, host_keys
from jaxnets.types import Array, Attack, LogitsFn


class Cascaded(NamedTuple):
    """What a cascade did.

    Attributes:
      x: adversarial rows ``[N, ...]``; survivors as they were.
      correct: whether each row survived all attacks, bool ``[N]``.
      queries: how many the attacks that count them took together, ``[N]``; None where none does.
      survived: by attack, whether each row survived it and all before it, bool ``[N]``.
    """

    x: np.ndarray
    correct: np.ndarray
    queries: np.ndarray | None
    survived: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Cascade:
    """An attack made of attacks: each is run on the rows that no earlier one broke. Made by `cascade`.

    Between attacks the surviving rows are gathered on the host into batches of a few fixed sizes, so that nothing is
    wasted on broken rows and nothing is compiled anew: it cannot run inside ``jax.jit``, where `worst_of` can.
    """

    attacks: Mapping[str, Attack]
    batch_size: int | None = None

    def __call__(self, key: Array, logits_fn: LogitsFn, x: Array, target: Array, /) -> Array:
        if isinstance(x, Tracer):
            raise ValueError("a cascade gathers surviving rows on the host: call it outside jit, or use worst_of")
        check_rows(x, target)
        return jax.numpy.asarray(self.run(key, logits_fn, x, target).x)

    def run(
        self,
        key: Array,
        logits_fn: LogitsFn,
        x: Array | np.ndarray,
        target: Array | np.ndarray,
        *,
        mesh: Mesh | None = None,
        on_batch: Callable[[str, int], None] = lambda name, rows: None,
    ) -> Cascaded:
        """Attacks rows ``x[N, ...]`` of classes ``target[N]``.

        Args:
          key: one, or one a row.
          logits_fn: ``x[B, ...] -> logits[B, K]``.
          x, target: rows and their classes.
          mesh: devices along an automatic axis ``data``, as of `parallel.data_mesh`; all of them unless given.
          on_batch: told an attack's name and how many rows were done (broken before: all at once).
        """
        mesh = parallel.mesh_or_all(mesh)
        found, target, keys = np.array(x), np.asarray(target), host_keys(key, len(x))
        on_rows = partial(attack_rows, logits_fn=logits_fn, batch_size=self.batch_size, mesh=mesh)
        correct = on_rows(None, keys, x=found, target=target).correct
        queries, survived = None, {}
        for number, (name, attack) in enumerate(self.attacks.items()):
            left = np.flatnonzero(correct)
            on_batch(name, len(found) - len(left))
            told = partial(on_batch, name)
            done = on_rows(attack, keys[left], x=found[left], target=target[left], number=number, on_rows=told)
            # A survivor goes on from the clean row: what did not break it helps no other attack.
            found[left[~done.correct]] = done.x[~done.correct]
            correct[left] = done.correct
            survived[name] = correct.copy()
            if done.queries is not None:
                queries = np.zeros(len(found), np.int64) if queries is None else queries
                queries[left] += done.queries
        return Cascaded(found, correct, queries, survived)


def cascade(attacks: Mapping[str, Attack], *, batch_size: int | None = None) -> Cascade:
    """Runs attacks in the order given, each on the rows that survived those before it.

    Args:
      attacks: by name, untargeted all (a targeted one of many classes, such as `apgd_targeted`, counts as such).
      batch_size: rows at once; `parallel.rows_at_once` unless given.

    Raises:
      ValueError: without attacks.
    """
    if not attacks:
        raise ValueError("cascade takes at least one attack, got none")
    return Cascade(dict(attacks), batch_size)
