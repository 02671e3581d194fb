"""Signs of masked gradients, which make a model look more robust than it is, and of gradients that fade with depth."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import parallel
from jaxnets.attacks.combinators import worst_of
from jaxnets.attacks.gradient import fgsm, pgd
from jaxnets.attacks.parts.calling import as_pytree
from jaxnets.attacks.parts.derivatives import input_gradient
from jaxnets.attacks.parts.on_host import attack_rows, host_keys
from jaxnets.attacks.square import square
from jaxnets.classifier import Classifier
from jaxnets.evaluation import evaluate
from jaxnets.losses import cross_entropy, margin
from jaxnets.threats import Threat
from jaxnets.types import Array, Attack, Batch, LogitsFn, Objective, Params, Stats
from jaxnets.verification import verify


class MaskedGradients(NamedTuple):
    """Signs of masked gradients (Athalye et al. 2018), as fractions of the rows; print it for the verdict.

    Attributes:
      zero_gradients: rows at which the gradient of the cross-entropy is exactly zero.
      clean: right rows without an attack.
      leaking: right rows under FGSM where it attacks those too that are wrong without it. Above ``clean``: label
        leaking, the attack tells the class (Kurakin et al. 2017).
      one_step: right rows under FGSM.
      many_steps: right rows under PGD on cross-entropy and margin. Above ``one_step``: steps are worse than one.
      black_box: by attack without gradients, rows that it broke and PGD did not.
      unbounded: right rows under PGD that may go anywhere in the box. Above ``chance``: PGD is blind.
      chance: one over the number of classes.
    """

    zero_gradients: float
    clean: float
    leaking: float
    one_step: float
    many_steps: float
    black_box: dict[str, float]
    unbounded: float
    chance: float

    def signs(self) -> list[str]:
        """What is suspicious, a line each; none where nothing is."""
        found = {
            f"zero gradients at {self.zero_gradients:.1%} of the rows": self.zero_gradients > 0,
            f"label leaking: under FGSM {self.leaking:.1%} are right, more than the clean {self.clean:.1%}": (
                self.leaking > self.clean
            ),
            f"one step beats many: FGSM leaves {self.one_step:.1%}, PGD {self.many_steps:.1%}": (
                self.many_steps > self.one_step
            ),
            f"an unbounded attack leaves {self.unbounded:.1%}, more than chance ({self.chance:.1%})": (
                self.unbounded > self.chance
            ),
        }
        found |= {
            f"{name}, without gradients, breaks {won:.1%} that PGD does not": won > 0.01
            for name, won in self.black_box.items()
        }
        return [sentence for sentence, holds in found.items() if holds]

    def __str__(self) -> str:
        measured = (
            f"zero gradients {self.zero_gradients:.1%}, FGSM {self.one_step:.1%}, PGD {self.many_steps:.1%}, "
            + "".join(f"{name} beyond PGD {won:.1%}, " for name, won in self.black_box.items())
            + f"unbounded {self.unbounded:.1%}"
        )
        signs = self.signs()
        verdict = "".join(f"\n  sign: {sign}" for sign in signs) if signs else "; no sign"
        return f"masked gradients? {measured}{verdict}"


def masked_gradients(
    key: Array,
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    *,
    threat: Threat,
    steps: int = 20,
    black_box: Mapping[str, Attack] | None = None,
) -> MaskedGradients:
    """Looks for signs of masked gradients.

    Args:
      key: of the attacks.
      logits_fn: ``x[B, ...] -> logits[B, K]``.
      x: rows ``[N, ...]``, float, inside the threat's box.
      y: classes ``[N]``.
      threat: the ball in which FGSM, PGD and the attacks without gradients work.
      steps: of PGD.
      black_box: attacks that take no gradient of this model: Square of 500 queries unless given; one that transfers
        examples from another model.

    Athalye et al. 2018, https://arxiv.org/abs/1802.00420; Carlini et al. 2019, https://arxiv.org/abs/1902.06705.
    """
    if black_box is None:
        black_box = {"square": partial(square, threat=threat, queries=500)}
    logits_fn = as_pytree(logits_fn)
    gradient, logits = jax.jit(partial(input_gradient, loss=cross_entropy))(logits_fn, x=jnp.asarray(x), target=y)
    report = evaluate(key, logits_fn, x, y, {"pgd": _many_steps(threat, steps), **black_box}, threat=threat)
    # On all rows, where `evaluate` attacks the right ones.
    one_step = attack_rows(
        partial(fgsm, threat=threat),
        host_keys(key, len(x)),
        logits_fn,
        x,
        y,
        batch_size=None,
        mesh=parallel.data_mesh(),
    )
    verify("fgsm", one_step.x, x, threat)
    everywhere = _whole_box(threat, x)
    free = evaluate(key, logits_fn, x, y, {"pgd": _many_steps(everywhere, steps)}, threat=everywhere)
    survived = report.survived
    return MaskedGradients(
        zero_gradients=float((np.asarray(gradient) == 0).reshape(len(x), -1).all(axis=1).mean()),
        clean=float(survived["clean"].mean()),
        leaking=float(one_step.correct.mean()),
        one_step=float((survived["clean"] & one_step.correct).mean()),
        many_steps=float(survived["pgd"].mean()),
        black_box={name: float((survived["pgd"] & ~survived[name]).mean()) for name in black_box},
        unbounded=float(free.survived["pgd"].mean()),
        chance=1 / logits.shape[-1],
    )


def _many_steps(threat: Threat, steps: int) -> Attack:
    """PGD on the cross-entropy and on the margin, which does not saturate."""
    one = partial(pgd, threat=threat, steps=steps)
    return worst_of(one, partial(one, loss=margin))


def _whole_box(threat: Threat, x: np.ndarray) -> Threat:
    """The same norm with a ball that holds the box."""
    corner, opposite = (jnp.full(x.shape[1:], end, x.dtype) for end in (threat.lower, threat.upper))
    unbounded = replace(threat, epsilon=jnp.inf)  # pyright: ignore
    return replace(threat, epsilon=float(threat.size(unbounded.project(opposite, corner) - corner)))  # pyright: ignore


def gradient_norms(
    net: Classifier, objective: Objective, params: Params, stats: Stats, batch: Batch, key: Array
) -> dict[str, float]:
    """The Euclidean norm of the objective's gradient with respect to the kernel of each layer, in the layers' order.

    Where those of the first layers are many times smaller or larger than that of the last, training does not reach them
    or breaks there.

    Args:
      net: what names the layers.
      objective: of that network.
      params, stats, batch, key: what the gradient is taken at, as a training step does.

    Returns:
      ``{path of a layer: norm}``; layers without a kernel have none.

    >>> from jaxnets import from_linen, models, objectives
    >>> net, x = from_linen(models.MLP((3,))), jnp.ones((2, 4))
    >>> key = jax.random.key(0)
    >>> norms = gradient_norms(net, objectives.standard(net), *net.init(key, x), Batch(x, jnp.array([0, 1])), key)
    >>> list(norms)
    ['Dense_0', 'Dense_1']
    """
    order = []

    def run(x: Array) -> Array:
        logits, _, seen = net.activations(params, stats, x)
        order.extend(seen)
        return logits

    jax.eval_shape(run, batch.x)
    gradient = jax.jit(jax.grad(objective, has_aux=True))(params, stats, batch, key)[0]
    norms = {
        "/".join(step.key for step in path[:-1]): float(jnp.linalg.norm(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if path[-1].key == "kernel"
    }
    return {name: norms[name] for name in order if name in norms}
