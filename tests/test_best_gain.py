"""What attacks inside a ball gain where the most that can be gained is known: 97% of it at least."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets import attacks

KEY, ROWS, SHAPE, EPSILON = jax.random.key(0), 6, (4, 4, 2), 0.5
margin = jn.losses.margin


def lead_of(logits, target, wanted):
    """How far the class ``wanted`` leads."""
    wanted, target = (jax.nn.one_hot(classes, logits.shape[-1]) for classes in (wanted, target))
    return jnp.sum((wanted - target) * logits, axis=-1)


CENTRED = {"start": attacks.at_clean}
ATTACKS = {
    "fgsm": (partial(attacks.fgsm, loss=margin), ("Linf", "L2", "L1")),
    "pgd": (partial(attacks.pgd, loss=margin, **CENTRED), ("Linf", "L2", "L1")),
    "bim": (partial(attacks.bim, loss=margin), ("Linf", "L2", "L1")),
    "mi_fgsm": (partial(attacks.mi_fgsm, loss=margin), ("Linf", "L2")),
    "ni_fgsm": (partial(attacks.ni_fgsm, loss=margin), ("Linf", "L2")),
    "adam_pgd": (partial(attacks.adam_pgd, loss=margin, steps=40), ("Linf",)),
    "apgd": (partial(attacks.apgd, loss=margin), ("Linf", "L2", "L1")),
    # Not in L1: the paper's steps there never go back from two coordinates to the one that is best.
    "apgd_targeted": (partial(attacks.apgd_targeted, classes=3, loss=lead_of), ("Linf", "L2")),
    "square": (partial(attacks.square, queries=2500), ("Linf",)),
    "nes": (partial(attacks.nes, queries=20_000, step_size=0.02), ("Linf",)),
    "spsa": (partial(attacks.spsa, queries=25_000, step_size=0.02), ("Linf",)),
}
CASES = [(name, norm) for name, (_, norms) in ATTACKS.items() for norm in norms]


def each_of(cases, always):
    """Those not named in ``always`` are slow tests."""
    marks = {name: () if name in always else pytest.mark.slow for name in ATTACKS}
    return pytest.mark.parametrize(("name", "norm"), [pytest.param(*case, marks=marks[case[0]]) for case in cases])


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


def kinked(weights, x):
    """Slopes one and three of the lead ``w . (x - 5)``, which bends at a quarter of what the budget can do."""
    lead = linear(weights, x - 5)[:, 0]
    # Attacks that are done with a row once it is wrong never are.
    return jnp.stack([jnp.full_like(lead, 20), jnp.maximum(lead, 3 * lead - 0.5)], axis=1)


def single(values):
    """Doubles that are whole single-precision numbers: rows are what the attacks see."""
    return values.astype(np.float32).astype(np.float64)


def run(name, norm, logits_fn, x, y):
    threat = getattr(jn, norm)(EPSILON, -50.0, 50.0)
    x_adv = ATTACKS[name][0](KEY, logits_fn, jnp.asarray(x, jnp.float32), jnp.asarray(y), threat=threat)
    references.assert_inside(threat, x_adv, x)
    return np.asarray(x_adv, np.float64)


def margins(logits, y):
    others = np.where(np.arange(logits.shape[1]) == y[:, None], -np.inf, logits)
    return others.max(axis=1) - logits[np.arange(len(y)), y]


@each_of(CASES, always=("fgsm", "pgd", "apgd", "apgd_targeted", "square"))
def test_on_a_linear_model(name, norm):
    """The margin can rise to ``max_k z_k - z_y + epsilon |w_k - w_y|``, in the dual norm."""
    random = np.random.default_rng(0)
    classes = 4 if name == "apgd_targeted" else 2
    weights, x = random.normal(size=(32, classes)), single(5 + random.normal(size=(ROWS, *SHAPE)))
    logits = linear(weights, x)
    y = logits.argmax(axis=1)
    dual = references.dual(references.ORDERS[norm])
    slopes = np.linalg.norm(weights[:, None] - weights[:, :, None], dual, axis=0)
    best = margins(logits + EPSILON * slopes[y], y)
    found = margins(linear(weights, run(name, norm, Partial(linear, jnp.asarray(weights, jnp.float32)), x, y)), y)
    # By how much the lead of the class that can lead most can rise: more than the margin where it came from behind.
    leads = np.where(np.arange(classes) == y[:, None], -np.inf, logits + EPSILON * slopes[y])
    gain = EPSILON * slopes[y, leads.argmax(axis=1)]
    assert (found >= best - 0.03 * gain).all()
    assert (found <= best + 1e-4 * gain).all()


@each_of([case for case in CASES if case[0] != "apgd_targeted"], always=("pgd", "apgd"))
def test_on_a_piecewise_linear_model(name, norm):
    """Its two classes are too few for `apgd_targeted`, which has the linear model alone."""
    random = np.random.default_rng(1)
    weights = random.normal(size=(32, 1))
    weights /= EPSILON * np.linalg.norm(weights, references.dual(references.ORDERS[norm]))
    x = 5 + random.normal(size=(ROWS, *SHAPE))
    # Rows whose lead is between -0.1 and 0.2; the ball lets it rise by 1.
    wanted = np.linspace(-0.1, 0.2, ROWS)
    missing = (wanted - linear(weights, x - 5)[:, 0]) / (weights**2).sum()
    x = single(x + (missing[:, None] * weights[:, 0]).reshape(x.shape))
    best = np.maximum(wanted + 1, 3 * (wanted + 1) - 0.5) - np.maximum(wanted, 3 * wanted - 0.5)
    x_adv = run(name, norm, Partial(kinked, jnp.asarray(weights, jnp.float32)), x, np.zeros(ROWS, int))
    lead = linear(weights, x_adv - 5)[:, 0]
    gain = np.maximum(lead, 3 * lead - 0.5) - np.maximum(wanted, 3 * wanted - 0.5)
    assert (gain >= 0.97 * best).all()
    assert (gain <= (1 + 1e-3) * best).all()
