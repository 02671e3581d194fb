"""Signs of masked gradients and of overfitting to one attack, by which a model looks more robust than it is.

And of gradients that fade with depth.
"""

from collections.abc import Callable, Mapping
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
from jaxnets.attacks.parts.minimum_norm import box_width
from jaxnets.attacks.parts.on_host import attack_rows, checked_data, host_keys
from jaxnets.attacks.square import square
from jaxnets.classifier import Classifier
from jaxnets.evaluation import evaluate
from jaxnets.losses import cross_entropy, margin
from jaxnets.threats import Threat
from jaxnets.training import TrainState
from jaxnets.types import Array, Attack, Batch, LogitsFn, Objective, Params, Stats
from jaxnets.verification import verify

_PGD = "PGD on cross-entropy and margin"
"""A name that no other attack has."""


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

    Raises:
      ValueError: for a box without an end, and as `evaluation.evaluate` does.

    Athalye et al. 2018, https://arxiv.org/abs/1802.00420; Carlini et al. 2019, https://arxiv.org/abs/1902.06705.
    """
    box_width("masked_gradients", threat, "its unbounded attack goes as far as the box")
    if black_box is None:
        black_box = {"square": partial(square, threat=threat, queries=500)}
    logits_fn = as_pytree(logits_fn)
    report = evaluate(key, logits_fn, x, y, {_PGD: _many_steps(threat, steps), **black_box}, threat=threat)
    # On all rows, where `evaluate` attacks the right ones.
    keys, mesh = host_keys(key, len(x)), parallel.data_mesh()
    gradient, one_step = (
        attack_rows(one, keys, logits_fn, x, y, batch_size=None, mesh=mesh)
        for one in (_gradient_alone, partial(fgsm, threat=threat))
    )
    verify("fgsm", one_step.x, x, threat)
    everywhere = _whole_box(threat, x)
    free = evaluate(key, logits_fn, x, y, {_PGD: _many_steps(everywhere, steps)}, threat=everywhere)
    survived = report.survived
    return MaskedGradients(
        zero_gradients=float((gradient.x == 0).reshape(len(x), -1).all(axis=1).mean()),
        clean=float(survived["clean"].mean()),
        leaking=float(one_step.correct.mean()),
        one_step=float((survived["clean"] & one_step.correct).mean()),
        many_steps=float(survived[_PGD].mean()),
        black_box={name: float((survived[_PGD] & ~survived[name]).mean()) for name in black_box},
        unbounded=float(free.survived[_PGD].mean()),
        chance=1 / jax.eval_shape(logits_fn, x[:1]).shape[-1],
    )


@jax.jit
def _gradient_alone(key: Array, logits_fn: LogitsFn, x: Array, y: Array) -> Array:
    """The gradient at each row, made where an attack would be: in batches that fit into memory."""
    return input_gradient(logits_fn, cross_entropy, x, y)[0]


def _many_steps(threat: Threat, steps: int) -> Attack:
    """PGD on the cross-entropy and on the margin, which does not saturate."""
    one = partial(pgd, threat=threat, steps=steps)
    return worst_of(one, partial(one, loss=margin))


def _whole_box(threat: Threat, x: np.ndarray) -> Threat:
    """The same norm with a ball that holds the box."""
    corner, opposite = (jnp.full(x.shape[1:], end, x.dtype) for end in (threat.lower, threat.upper))
    unbounded = replace(threat, epsilon=jnp.inf)  # pyright: ignore
    return replace(threat, epsilon=float(threat.size(unbounded.project(opposite, corner) - corner)))  # pyright: ignore


class CatastrophicOverfittingError(RuntimeError):
    """A network has learned to survive the attack that it is trained against, and no other."""


def overfitting_guard(
    key: Array,
    net: Classifier,
    x: np.ndarray,
    y: np.ndarray,
    *,
    attack: Attack,
    threat: Threat,
    steps: int = 10,
    gap: float = 0.3,
) -> Callable[[TrainState], dict[str, float]]:
    """For ``fit(evaluate=...)``: ends one-step training where rows survive its own attack and not PGD.

    It hangs on the state alone, not on states before, so that a run that was stopped and goes on is judged as one never
    stopped. It is asked before the state is saved: after the exception the newest checkpoint is that of the last epoch
    that passed. Go on from there with a smaller step, or with `objectives.n_fgsm` or `objectives.grad_align`.

    Args:
      key: of both attacks.
      net: the network.
      x, y: some hundred rows of training, ``[N, ...]`` and classes ``[N]``.
      attack: what the network is trained against.
      threat: what PGD is allowed.
      steps: of PGD.
      gap: of the two accuracies, above which it is catastrophic: sound networks stay below 0.2, broken ones lose all.

    Returns:
      ``state -> {"one step": accuracy, "pgd": accuracy}``.

    Raises:
      ValueError: for rows outside the box.
      CatastrophicOverfittingError: when called, beyond the gap.

    Wong et al. 2020, https://arxiv.org/abs/2001.03994, section 5.4, who watch PGD on a batch of training rows and stop
    where it falls from one epoch to the next.

    >>> from jaxnets import Linf, from_linen, models
    >>> net, threat, x, y = from_linen(models.MLP(())), Linf(0.1), np.full((4, 3), 0.5, np.float32), np.arange(4)
    >>> attack = partial(fgsm, threat=threat, step_size=0.125)
    >>> guard = overfitting_guard(jax.random.key(0), net, x, y, attack=attack, threat=threat)  # fit(evaluate=guard)
    """
    suite = {"one step": attack, "pgd": partial(pgd, threat=threat, steps=steps)}
    x = checked_data("overfitting_guard", x, threat)
    keys, mesh = host_keys(key, len(x)), parallel.data_mesh()

    def watch(state: TrainState) -> dict[str, float]:
        model = net.logits_fn(state.params, state.stats)
        survived = {
            name: float(attack_rows(one, keys, model, x, y, batch_size=None, mesh=mesh).correct.mean())
            for name, one in suite.items()
        }
        if survived["one step"] - survived["pgd"] > gap:
            raise CatastrophicOverfittingError(
                f"step {int(state.step)}: {survived['one step']:.1%} of {len(x)} training rows survive the attack of "
                f"training, {survived['pgd']:.1%} PGD-{steps}. The newest checkpoint is the last that passed: go on "
                "from it with a smaller step, n_fgsm or grad_align"
            )
        return survived

    return watch


def gradient_norms(
    net: Classifier, objective: Objective, params: Params, stats: Stats, batch: Batch, key: Array
) -> dict[str, float]:
    """The Euclidean norm of the objective's gradient with respect to the weights of each layer, in the layers' order.

    A layer's weights are its arrays of two and more dimensions, together: kernels, or the centres of `RadialBasis`, but
    no biases, and no scales of a normalisation. Where the norms of the first layers are many times smaller or larger
    than that of the last, training does not reach them or breaks there.

    Args:
      net: what names the layers.
      objective: of that network.
      params, stats, batch, key: what the gradient is taken at, as a training step does.

    Returns:
      ``{path of a layer: norm}``; layers without weights have none, and arrays of the network itself are no layer.

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
    norms = _norms_of_weights(gradient)
    # Behind them the layers within a recurrent one, whose every step gives something.
    return {name: norms[name] for name in dict.fromkeys([*order, *filter(None, norms)]) if name in norms}


def _norms_of_weights(tree: Params) -> dict[str, float]:
    """By the path of what they are the weights of."""
    norms: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *layer, array = (step.key for step in path)
        # The biases of attention have two dimensions.
        if leaf.ndim > 1 and array != "bias":
            name = "/".join(layer)
            norms[name] = float(np.hypot(norms.get(name, 0), np.linalg.norm(np.asarray(leaf, float))))
    return norms
