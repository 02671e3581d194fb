"""How adversarial examples made on some models do on others: every attack, every surrogate, every target."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxnets import parallel
from jaxnets.attacks.parts.on_host import attack_rows, checked_data, host_keys
from jaxnets.evaluation import table
from jaxnets.threats import Threat
from jaxnets.types import Array, Attack, LogitsFn
from jaxnets.verification import verify


class Transfer(NamedTuple):
    """Which targets stood which examples; ``print`` it for a table of accuracies with 95% intervals.

    Attributes:
      clean: by target, which rows it classifies correctly without an attack: bool ``[N]``.
      survived: by ``(attack, surrogate)`` and then by target, which of these rows it still does: bool ``[N]``.
      examples: by ``(attack, surrogate)``, the adversarial examples ``[N, ...]``.
      queries: by ``(attack, surrogate)``, of attacks that count them, what each row has cost: int ``[N]``.
    """

    clean: dict[str, np.ndarray]
    survived: dict[tuple[str, str], dict[str, np.ndarray]]
    examples: dict[tuple[str, str], np.ndarray]
    queries: dict[tuple[str, str], np.ndarray]

    def accuracies(self) -> np.ndarray:
        """The fraction of rows that survive, ``[attacks x surrogates, targets]`` in the order of ``survived``."""
        return np.array([[rows.mean() for rows in by_target.values()] for by_target in self.survived.values()])

    def success_rates(self) -> np.ndarray:
        """Of the rows that a target classifies correctly, the fraction that fools it; NaN where there are none."""
        right = np.array([rows.sum() for rows in self.clean.values()], float)
        left = self.accuracies() * len(next(iter(self.clean.values())))
        return np.divide(right - left, right, out=np.full_like(left, np.nan), where=right > 0)

    def __str__(self) -> str:
        lines = {"clean": self.clean}
        lines |= {f"{attack} on {surrogate}": rows for (attack, surrogate), rows in self.survived.items()}
        cells = {name: [(int(rows.sum()), len(rows)) for rows in line.values()] for name, line in lines.items()}
        return table(cells, list(self.clean))


def transferability(
    key: Array,
    surrogates: Mapping[str, LogitsFn],
    targets: Mapping[str, LogitsFn],
    x: np.ndarray,
    y: np.ndarray,
    attacks: Mapping[str, Attack],
    *,
    threat: Threat,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    on_batch: Callable[[str, str, int], None] = lambda attack, surrogate, rows: None,
) -> Transfer:
    """Makes examples with every attack on every surrogate, and asks every target what they are.

    All rows are attacked, those too that a surrogate gets wrong; for a target, a row that it gets wrong without an
    attack survives nothing. The attacks see nothing of the targets, unless a model stands on both sides. Examples are
    checked against the threat by code that made none.

    Args:
      key: of the attacks.
      surrogates: by name, the models that are attacked; `attacks.transfer.ensemble` makes one of several.
      targets: by name, the models that are asked.
      x: rows ``[N, ...]``, float, inside the threat's box.
      y: classes ``[N]``.
      attacks: by name, untargeted.
      threat: what the attacks were allowed.
      batch_size: rows at once, rounded up to a multiple of the devices; `parallel.rows_at_once` unless given.
      mesh: devices along an automatic axis ``data``, as of `parallel.data_mesh`; all of them unless given.
      on_batch: told the attack's name, the surrogate's, and how many rows were done, after each batch.

    Raises:
      InvalidExample: where an example is not finite, or outside the box or the ball.
      ValueError: without rows, surrogates, targets or attacks, or where ``x``, ``y`` and the threat do not fit.

    Papernot et al. 2016, https://arxiv.org/abs/1605.07277; Dong et al. 2018, https://arxiv.org/abs/1710.06081.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"transferability needs as many classes as rows, at least one: got {len(x)} and {len(y)}")
    for what, given in (("surrogate", surrogates), ("target", targets), ("attack", attacks)):
        if not given:
            raise ValueError(f"transferability needs at least one {what} by name, got none")
    x = checked_data("transferability", x, threat)
    mesh = parallel.mesh_or_all(mesh)
    keys = host_keys(key, len(x))

    def correct(logits_fn: LogitsFn, rows: np.ndarray) -> np.ndarray:
        return attack_rows(None, keys, logits_fn, rows, y, batch_size=batch_size, mesh=mesh).correct

    clean = {name: correct(target, x) for name, target in targets.items()}
    result = Transfer(clean, {}, {}, {})
    for one in product(attacks, surrogates):
        attack, surrogate = attacks[one[0]], surrogates[one[1]]
        told = partial(on_batch, one[0], one[1])
        done = attack_rows(attack, keys, surrogate, x, y, batch_size=batch_size, mesh=mesh, on_rows=told)
        verify(f"{one[0]} on {one[1]}", done.x, x, threat)
        result.examples[one] = done.x
        result.survived[one] = {name: clean[name] & correct(target, done.x) for name, target in targets.items()}
        if done.queries is not None:
            result.queries[one] = done.queries
    return result
