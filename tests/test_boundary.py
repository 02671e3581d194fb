"""The boundary attack: against the nearest point of a plane, its proposals against geometry, its count of queries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.boundary import _propose, boundary
from jaxnets.attacks.parts.queries import with_queries

KEY = jax.random.key(0)
ROWS, INPUTS = 8, 6
margin, targeted = jn.losses.margin, jn.losses.targeted
THREAT = jn.L2(jnp.inf, -8.0, 8.0)


def plane(normal, x):
    lead = x @ normal
    return jnp.stack([-lead, lead], axis=1)


# Powers of two: the lead comes out the same whatever the order of the sum, so that no label hangs on rounding.
NORMAL = jnp.array([1.0, -2.0, 0.5, 0.0, 1.0, -1.0])
MODEL = Partial(plane, NORMAL)


def rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, INPUTS)), jnp.float32)
    distances = np.abs(np.asarray(x) @ np.asarray(NORMAL)) / np.linalg.norm(NORMAL)
    return x, jnp.argmax(MODEL(x), axis=1), distances


def attack(**options):
    return with_queries(partial(boundary, threat=THREAT, **options))


def test_nearest_point_of_a_plane():
    x, y, distances = rows()
    result = attack(queries=3000)(KEY, MODEL, x, y)
    assert (jnp.argmax(MODEL(result.x), axis=1) != y).all()
    found = references.norm(2, result.x - x)
    assert (found >= distances * (1 - 1e-4)).all()
    assert (found <= distances * 1.05).all()


def test_more_queries_never_do_worse_and_none_are_spent_beyond_the_budget():
    x, y, _ = rows()
    budgets, last = (0, 1, 2, 6, 20, 100, 400), np.inf
    for queries in budgets:
        result = attack(queries=queries)(KEY, MODEL, x, y)
        np.testing.assert_array_equal(result.queries, queries)
        size = references.norm(2, result.x - x)
        size = np.where(size > 0, size, np.inf)
        assert (size <= last).all()
        last = size
    together = attack()(KEY, MODEL, x, y, queries=jnp.array([*budgets, 50]))
    np.testing.assert_array_equal(together.queries, [*budgets, 50])
    np.testing.assert_allclose(together.x[6], result.x[6], atol=1e-6)


def test_queries_are_what_the_model_is_asked():
    x, y, _ = rows()
    counts = []

    def counted(x):
        jax.debug.callback(lambda x: counts.append(len(x)), x)
        return MODEL(x)

    for queries in (1, 3, 137):
        counts.clear()
        asked = attack(queries=queries)(KEY, counted, x[:1], y[:1]).queries[0]
        jax.effects_barrier()
        assert asked == sum(counts) == queries


@pytest.mark.parametrize("around", [0.01, 0.5])
def test_proposals_lie_on_the_sphere_and_then_nearer(around, x64):
    x = jnp.zeros((3, 4))
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    distance = jnp.linalg.norm(x_t)
    wide = jn.L2(jnp.inf, -100.0, 100.0)
    points = [_propose(jax.random.key(n), wide, x, x_t, jnp.asarray(around), jnp.asarray(0.1)) for n in range(50)]
    for on_sphere, nearer in points:
        assert abs(jnp.linalg.norm(on_sphere) - distance) < 1e-9
        assert abs(jnp.linalg.norm(nearer) - 0.9 * distance) < 1e-9
        np.testing.assert_allclose(nearer, 0.9 * on_sphere, atol=1e-9)
        # The tangent of the angle that it has gone round is the step's length.
        cosine = jnp.sum(on_sphere * x_t) / distance**2
        np.testing.assert_allclose(jnp.sqrt(1 - cosine**2) / cosine, around, rtol=1e-6)
    assert jnp.linalg.norm(sum(on_sphere for on_sphere, _ in points) / 50 - x_t) < 0.5 * distance
    # In a box: inside it, and never further away than without.
    for n in range(50):
        on_sphere, nearer = _propose(
            jax.random.key(n), jn.L2(jnp.inf), 0.5 + x, jnp.clip(0.5 + x_t, 0, 1), jnp.asarray(around), jnp.asarray(0.1)
        )
        start = jnp.linalg.norm(jnp.clip(x_t, -0.5, 0.5))
        assert max(jnp.abs(on_sphere - 0.5).max(), jnp.abs(nearer - 0.5).max()) <= 0.5
        assert jnp.linalg.norm(nearer - 0.5) <= 0.9 * start + 1e-9


def test_a_row_stops_where_it_is_near_enough():
    x, y, distances = rows()
    enough = 1.5 * jnp.asarray(distances, jnp.float32)
    result = attack(queries=3000)(KEY, MODEL, x, y, stop_at=enough)
    assert (references.norm(2, result.x - x) <= enough + 1e-5).all()
    assert (result.queries < 2000).all()


def test_targeted_from_given_points():
    random = np.random.default_rng(1)
    weights = jnp.asarray(random.normal(size=(INPUTS, 4)), jnp.float32)
    logits_fn = Partial(lambda w, x: (x - 0.5) @ w, weights)
    pool = jnp.asarray(random.uniform(size=(200, INPUTS)), jnp.float32)
    labels = jnp.argmax(logits_fn(pool), axis=1)
    x, wanted = pool[:ROWS], (labels[:ROWS] + 1) % 4
    start = jnp.stack([pool[int(np.argmax(labels == label))] for label in wanted])
    options = {"threat": jn.L2(jnp.inf), "loss": targeted(margin), "start_points": start}
    x_adv = boundary(KEY, logits_fn, x, wanted, queries=1000, **options)
    np.testing.assert_array_equal(jnp.argmax(logits_fn(x_adv), axis=1), wanted)
    assert (references.norm(2, x_adv - x) < references.norm(2, start - x)).all()
    # Whose class is the one wanted already stays.
    done = with_queries(partial(boundary, **options))(KEY, logits_fn, x, labels[:ROWS], queries=1000)
    np.testing.assert_array_equal(done.x, x)
    np.testing.assert_array_equal(done.queries, 1)


def test_a_result_beyond_epsilon_and_a_row_without_a_start_are_clean():
    x, y, distances = rows()
    epsilon = float(np.median(distances)) * 1.1
    x_adv = boundary(KEY, MODEL, x, y, threat=jn.L2(epsilon, -8.0, 8.0), queries=3000)
    references.assert_inside(jn.L2(epsilon, -8.0, 8.0), x_adv, x)
    moved = np.asarray((x_adv != x).any(axis=1))
    assert moved[distances < 0.9 * epsilon].all()
    assert not moved[distances > epsilon].any()
    for logits_fn in (lambda x: jnp.zeros((len(x), 2)), lambda x: jnp.full((len(x), 2), jnp.nan)):
        result = attack(draws=7)(KEY, logits_fn, x, jnp.zeros_like(y))
        np.testing.assert_array_equal(result.x, x)
        np.testing.assert_array_equal(result.queries, 8)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch():
    x, y, _ = rows()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(ROWS))
    whole = attack(queries=300)(keys, MODEL, x, y)
    for part in (np.arange(1), np.arange(7), np.arange(ROWS)[::-1]):
        some = attack(queries=300)(keys[part], MODEL, x[part], y[part])
        np.testing.assert_allclose(some.x, whole.x[part], atol=1e-5)
        np.testing.assert_array_equal(some.queries, whole.queries[part])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_binary_images_and_single_precision_rows_while_double_is_on(dtype, x64):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 3, 3, 1)), dtype)
    lead = lambda x: 3.0 - x.reshape(len(x), -1).sum(axis=1)  # noqa: E731
    logits_fn = lambda x: jnp.stack([lead(x), -lead(x)], axis=1)  # noqa: E731
    x_adv = boundary(KEY, logits_fn, x, jnp.zeros(4, jnp.int32), threat=jn.L2(jnp.inf), queries=150)
    assert x_adv.dtype == dtype
    references.assert_inside(jn.L2(100.0), x_adv, x)


def test_bad_arguments_raise():
    x, y, _ = rows()
    for threat in (jn.Linf(1.0), jn.L1(1.0)):
        with pytest.raises(ValueError, match="it takes L2, got"):
            boundary(KEY, MODEL, x, y, threat=threat)
    with pytest.raises(ValueError, match="start_points must have the shape of x"):
        boundary(KEY, MODEL, x, y, threat=THREAT, start_points=x[:2])
    with pytest.raises(ValueError, match="finite box"):
        boundary(KEY, MODEL, x, y, threat=jn.L2(1.0, -jnp.inf, jnp.inf))
