"""Box-constrained L-BFGS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial
from test_carlini_wagner import curved, tilted

import jaxnets as jn
from jaxnets.attacks.lbfgs import lbfgs, quasi_newton
from jaxnets.attacks.parts.calling import row_keys

KEY = jax.random.key(0)
L2 = jn.L2(jnp.inf)
SHORT = {"steps": 20, "rounds": 6}


def test_nearest_boundary_of_a_linear_model():
    x, y, logits_fn, gap, w = tilted()
    x_adv = lbfgs(KEY, logits_fn, x, y, threat=L2, **SHORT)
    ratio = references.norm(2, x_adv - x) / (gap / np.linalg.norm(w))
    assert (jnp.argmax(logits_fn(x_adv), axis=1) != y).all()
    assert ratio.max() < 1.01, ratio


def test_minimiser_finds_the_minimum_of_a_quadratic_in_the_box(x64):
    """The coordinates of a minimum in the box that lie on its faces are held there."""
    random = np.random.default_rng(0)
    root = random.normal(size=(6, 6))
    hessian, centre, x = root @ root.T + 0.1 * np.eye(6), random.uniform(-0.5, 1.5, size=6), np.full(6, 0.5)
    value = lambda z: 0.5 * (z - centre) @ hessian @ (z - centre)  # noqa: E731
    minimiser, threat, points = quasi_newton(10), L2, []
    state = minimiser.init(threat, jnp.asarray(x), jnp.asarray(x))
    step = jax.jit(minimiser.step)
    for _ in range(60):
        points.append(np.asarray(minimiser.place(state, threat, jnp.asarray(x))))
        gradient = hessian @ (points[-1] - centre)
        state = step(state, threat, jnp.asarray(x), points[-1], value(points[-1]), jnp.asarray(gradient))
    found = min(points, key=value)
    expected = x
    for _ in range(20000):
        expected = np.clip(expected - hessian @ (expected - centre) / np.linalg.norm(hessian, 2), 0, 1)
    assert 0 < ((expected == 0) | (expected == 1)).sum() < 5
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rounding_is_no_curvature():
    """Two points apart by rounding whose gradients hardly differ: the next point is not far off, where a row would
    succeed with a constant that is too small."""
    x, point, gradient = jnp.full(6, 0.5), jnp.full(6, 0.7), jnp.full(6, 0.1)
    minimiser = quasi_newton(10)
    state = minimiser.init(L2, x, x)
    for shift, drift in ((0.0, 0.0), (-1e-7, -1e-12)):
        state = minimiser.step(state, L2, x, point + shift, jnp.float32(1 + shift), gradient * (1e-6 + drift))
    assert jnp.abs(minimiser.place(state, L2, x) - point).max() < 1e-4


def test_binary_pixels_targets_epsilon_and_rows():
    x, y, logits_fn = curved()
    keys, settings = row_keys(KEY, 8), {"loss": jn.losses.targeted(jn.losses.margin), **SHORT}
    wanted = (y + 1) % 4
    free = lbfgs(keys, logits_fn, x, wanted, threat=L2, **settings)
    there = np.asarray(jnp.argmax(logits_fn(free), axis=1) == wanted)
    assert there.sum() >= 5
    np.testing.assert_array_equal(free[~there], x[~there])
    faces = ((x == 0) | (x == 1)) & there[:, None]
    assert (np.asarray(free != x) & np.asarray(faces)).any()
    first = lbfgs(keys[:3], logits_fn, x[:3], wanted[:3], threat=L2, **settings)
    np.testing.assert_allclose(first, free[:3], atol=1e-3)
    epsilon = float(np.median(references.norm(2, free - x)[there]))
    held = lbfgs(keys, logits_fn, x, wanted, threat=jn.L2(epsilon), **settings)
    references.assert_inside(jn.L2(epsilon), held, x)
    assert (references.norm(2, held - x) > 0).sum() >= 2
    np.testing.assert_array_equal(lbfgs(keys, logits_fn, x, y, threat=L2, **settings), x)


@pytest.mark.slow
def test_constant_and_broken_models_and_other_threats():
    x, y, _ = curved()
    for value in (0.0, jnp.nan):
        logits_fn = Partial(lambda value, x: jnp.full((len(x), 4), value), jnp.asarray(value))
        np.testing.assert_array_equal(lbfgs(KEY, logits_fn, x, jnp.zeros_like(y), threat=L2, **SHORT), x)
    with pytest.raises(ValueError, match="supports the threat L2, got Linf"):
        lbfgs(KEY, logits_fn, x, y, threat=jn.Linf(1.0))


@pytest.mark.slow
def test_types(x64):
    x, y, logits_fn = curved()
    for dtype in (jnp.float32, jnp.float64):
        assert lbfgs(KEY, logits_fn, x.astype(dtype), y, threat=L2, steps=3, rounds=2).dtype == dtype
