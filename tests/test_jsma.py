"""The saliency map attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_carlini_wagner import curved

import jaxnets as jn
from jaxnets.attacks.jsma import best_pair, jsma
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.threats import L0

KEY = jax.random.key(0)
FREE = L0(jnp.inf)
TARGETED = jn.losses.targeted(jn.losses.margin)


def saliency(a, b, free):
    """All pairs, in double precision: minus infinity where a pair is not allowed."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sums = a[:, None] + a, b[:, None] + b
    good = (sums[0] > 0) & (sums[1] > 0) & free[:, None] & free & ~np.eye(len(a), dtype=bool)
    return np.where(good, sums[0] * sums[1], -np.inf)


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("kind", ["free", "opposed", "tied"])
def test_the_best_pair_against_all_pairs(n, kind):
    random = np.random.default_rng(n)
    a, b = random.normal(size=(2, 60, n)).astype(np.float32)
    # Where helping and harming go together few coordinates are beaten by others.
    b = {"free": b, "opposed": 0.2 * b - a, "tied": np.round(b)}[kind]
    a = np.round(a) if kind == "tied" else a
    free = random.random((60, n)) < 0.8
    p, q, score = map(np.asarray, jax.jit(jax.vmap(best_pair))(a, b, free))
    for row in range(60):
        pairs = saliency(a[row], b[row], free[row])
        assert np.isfinite(pairs.max()) == (score[row] > 0)
        if score[row] > 0:
            assert pairs[p[row], q[row]] >= (1 - 1e-5) * pairs.max()


def by_hand(logits, jacobian, x, wanted, step):
    """The paper's algorithm 3 on one row: every point on the way."""
    points, x = [x], np.array(x)
    while logits(x).argmax() != wanted:
        rows = jacobian(x)
        sign = np.sign(step)
        free = x < 1 if step > 0 else x > 0
        pairs = saliency(sign * rows[wanted], -sign * (rows.sum(axis=0) - rows[wanted]), free)
        if not np.isfinite(pairs.max()):
            return points, False
        x = np.array(x)
        for place in np.unravel_index(pairs.argmax(), pairs.shape):
            x[place] = np.clip(x[place] + step, 0, 1)
        points.append(x)
    return points, True


@pytest.mark.parametrize("step", [1.0, -1.0, 0.4])
def test_against_numpy_on_a_small_network(step, x64):
    random = np.random.default_rng(3)
    w1, w2, x = random.normal(size=(10, 12)), random.normal(size=(12, 4)), random.uniform(size=(8, 10))
    logits = lambda z: np.tanh(z @ w1) @ w2  # noqa: E731
    jacobian = lambda z: (w1 @ (w2 * (1 - np.tanh(z @ w1) ** 2)[:, None])).T  # noqa: E731
    wanted = (logits(x).argmax(axis=1) + 1 + np.arange(8) % 3) % 4
    logits_fn = Partial(lambda a, b, x: jnp.tanh(x @ a) @ b, jnp.asarray(w1), jnp.asarray(w2))
    result = jsma(KEY, logits_fn, jnp.asarray(x), jnp.asarray(wanted), threat=FREE, step_size=step, loss=TARGETED)
    outcomes = []
    for row in range(8):
        points, success = by_hand(logits, jacobian, x[row], wanted[row], step)
        np.testing.assert_allclose(result[row], points[-1] if success else x[row], atol=1e-12)
        outcomes.append((success, len(points)))
    assert any(success for success, _ in outcomes)
    assert max(length for _, length in outcomes) > 2


@pytest.mark.parametrize("needed", [2, 4, 6])
def test_a_binary_image_changes_in_as_few_coordinates_as_it_must(needed):
    """Class 1 counts the white pixels of a half of the image: ``needed`` of them decide."""
    x = jnp.zeros((2, 4, 4, 1))
    mask = jnp.zeros(16).at[::2].set(1.0)
    logits_fn = Partial(lambda m, x: jnp.stack([needed - 0.5 - (f := x.reshape(len(x), -1)) @ m, f @ m], axis=1), mask)
    # The lead turns at (needed - 0.5) / 2 pixels; they come in pairs.
    least = 2 * int(np.ceil((needed - 0.5) / 4))
    x_adv = jsma(KEY, logits_fn, x, jnp.zeros(2, jnp.int32), threat=FREE)
    np.testing.assert_array_equal((np.asarray(x_adv) != 0).sum(axis=(1, 2, 3)), least)
    np.testing.assert_array_equal(jsma(KEY, logits_fn, x, jnp.zeros(2, jnp.int32), threat=L0(least - 1)), x)
    np.testing.assert_array_equal(jsma(KEY, logits_fn, x, jnp.zeros(2, jnp.int32), threat=L0(least)), x_adv)


@pytest.mark.slow
def test_more_targets_never_need_more_changes():
    x, y, logits_fn = curved()
    counts = []
    for targets in (1, 3, 9):
        x_adv = jsma(KEY, logits_fn, x, y, threat=FREE, targets=targets)
        found = np.asarray(jnp.argmax(logits_fn(x_adv), axis=1) != y)
        counts.append(np.where(found, (np.asarray(x_adv) != x).sum(axis=1), np.inf))
    assert (counts[1] <= counts[0]).all()
    assert (counts[1] < counts[0]).any()
    np.testing.assert_array_equal(counts[1], counts[2])


@pytest.mark.slow
def test_rows_limits_and_models_without_gradients():
    x, y, logits_fn = curved()
    keys = row_keys(KEY, 8)
    whole = jsma(keys, logits_fn, x, y, threat=L0(3), targets=3)
    assert (whole != x).sum(axis=1).max() == 2
    np.testing.assert_array_equal(jsma(keys[:3], logits_fn, x[:3], y[:3], threat=L0(3), targets=3), whole[:3])
    np.testing.assert_array_equal(jax.jit(lambda x: jsma(keys, logits_fn, x, y, threat=L0(3), targets=3))(x), whole)
    np.testing.assert_array_equal(jsma(keys, logits_fn, x, y, threat=L0(0), targets=3), x)
    np.testing.assert_array_equal(jsma(keys, logits_fn, x, (y + 1) % 4, threat=FREE), x)
    np.testing.assert_array_equal(jsma(keys, logits_fn, x, y, threat=FREE, step_size=jnp.zeros(())), x)
    for value in (0.0, jnp.nan):
        blind = Partial(lambda value, x: jnp.full((len(x), 4), value), jnp.asarray(value))
        np.testing.assert_array_equal(jsma(keys, blind, x, jnp.zeros_like(y), threat=FREE), x)


def test_bad_arguments_raise():
    x, y, logits_fn = curved()
    with pytest.raises(ValueError, match="supports the threat L0, got L1"):
        jsma(KEY, logits_fn, x, y, threat=jn.L1(1.0))
    with pytest.raises(ValueError, match="at least one target, got targets=0"):
        jsma(KEY, logits_fn, x, y, threat=FREE, targets=0)
    with pytest.raises(ValueError, match="pairs of coordinates"):
        jsma(KEY, logits_fn, x[:, :1], y, threat=FREE)
