"""HopSkipJump: against the nearest point of a linear model's boundary, and its count of queries against the model's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.attacks.hop_skip_jump import hop_skip_jump
from jaxnets.attacks.parts.queries import with_queries
from jaxnets.attacks.parts.stochastic import Stochastic

KEY = jax.random.key(0)
THREATS = {"L2": jn.L2, "Linf": jn.Linf}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
ROWS, INPUTS = 8, 12
margin, targeted = jn.losses.margin, jn.losses.targeted


def linear(weights, shift, x):
    return x.reshape(len(x), -1) @ weights + shift


def problem(seed=0, inputs=INPUTS):
    """Two classes, rows well inside the box [-20, 20] and near the plane between the classes."""
    random = np.random.default_rng(seed)
    x, weights = random.normal(size=(ROWS, inputs)), random.normal(size=(inputs, 2))
    y = np.argmax(x @ weights, axis=1)
    distances = {
        cls: np.abs(x @ (weights[:, 1] - weights[:, 0])) / np.linalg.norm(weights[:, 1] - weights[:, 0], dual)
        for cls, dual in ((jn.L2, 2), (jn.Linf, 1))
    }
    logits_fn = Partial(linear, jnp.asarray(weights, jnp.float32), jnp.zeros(2))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y), logits_fn, distances


@every_threat
def test_nearest_point_of_a_plane(cls):
    x, y, logits_fn, distances = problem()
    x_adv = hop_skip_jump(KEY, logits_fn, x, y, threat=cls(jnp.inf, -20.0, 20.0), queries=6000)
    assert (jnp.argmax(logits_fn(x_adv), axis=1) != y).all()
    found = references.norm(references.ORDERS[cls.__name__], x_adv - x)
    assert (found >= distances[cls] * (1 - 1e-4)).all()
    assert (found <= distances[cls] * 1.05).all()


@every_threat
def test_a_targeted_attack_from_given_points_ends_in_its_class(cls):
    random = np.random.default_rng(1)
    weights = jnp.asarray(random.normal(size=(INPUTS, 4)), jnp.float32)
    logits_fn = Partial(linear, weights, jnp.zeros(4))
    pool = jnp.asarray(random.uniform(size=(200, INPUTS)), jnp.float32)
    labels = jnp.argmax(logits_fn(pool - 0.5), axis=1)
    centred = Partial(lambda f, x: f(x - 0.5), logits_fn)
    x, wanted = pool[:ROWS], (labels[:ROWS] + 1) % 4
    start = jnp.stack([pool[int(np.argmax(labels == label))] for label in wanted])
    options = {"threat": cls(jnp.inf), "loss": targeted(margin), "start_points": start}
    few = hop_skip_jump(KEY, centred, x, wanted, queries=60, **options)
    many = hop_skip_jump(KEY, centred, x, wanted, queries=1500, **options)
    sizes = [references.norm(references.ORDERS[cls.__name__], z - x) for z in (start, few, many)]
    for z in (few, many):
        np.testing.assert_array_equal(jnp.argmax(centred(z), axis=1), wanted)
    assert (sizes[1] <= sizes[0]).all()
    assert (sizes[2] < sizes[1]).all()
    references.assert_inside(cls(100.0), many, x)


def test_queries_are_what_the_model_is_asked():
    x, y, logits_fn, _ = problem()
    counts = []

    def counted(x):
        jax.debug.callback(lambda x: counts.append(len(x)), x)
        return logits_fn(x)

    attack = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf, -20.0, 20.0), at_once=1))
    for queries in (0, 1, 2, 5, 20, 137, 500):
        counts.clear()
        asked = int(attack(KEY, counted, x[:1], y[:1], queries=queries).queries[0])
        jax.effects_barrier()
        # Alone, a row asks in every call: but in the first one, where its budget is nothing.
        assert sum(counts) == max(asked, 1)
        assert queries - 25 <= asked <= queries


@every_threat
def test_every_row_stops_at_its_own_budget(cls):
    x, y, logits_fn, _ = problem()
    attack = with_queries(partial(hop_skip_jump, threat=cls(jnp.inf, -20.0, 20.0)))
    budgets = jnp.array([0, 1, 3, 10, 60, 200, 333, 1000])
    together = attack(KEY, logits_fn, x, y, queries=budgets)
    assert (together.queries <= budgets).all()
    assert (together.queries[5:] > 0.8 * budgets[5:]).all()
    np.testing.assert_array_equal(together.x[0], x[0])
    # The shape of the batch decides how sums are rounded, and near the boundary rounding decides a label.
    whole = attack(KEY, logits_fn, x, y, queries=333)
    np.testing.assert_allclose(together.x[6], whole.x[6], atol=1e-5)


def test_a_row_stops_where_it_is_near_enough():
    x, y, logits_fn, distances = problem()
    attack = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf, -20.0, 20.0), queries=3000))
    enough = 1.3 * jnp.asarray(distances[jn.L2], jnp.float32)
    result = attack(KEY, logits_fn, x, y, stop_at=enough)
    assert (references.norm(2, result.x - x) <= enough + 1e-5).all()
    assert (result.queries < 2500).all()


def test_rows_that_are_wrong_already_cost_one_query_and_stay():
    x, y, logits_fn, _ = problem()
    wrong = y.at[:4].set(1 - y[:4])
    attack = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf, -20.0, 20.0), queries=200))
    result = attack(KEY, logits_fn, x, wrong)
    np.testing.assert_array_equal(result.x[:4], x[:4])
    np.testing.assert_array_equal(result.queries[:4], 1)
    assert (result.queries[4:] > 1).all()


@pytest.mark.slow
def test_rows_without_a_start_cost_the_draws_and_stay():
    x, y = jnp.full((3, 4), 0.5), jnp.zeros(3, jnp.int32)
    constant = lambda x: jnp.zeros((len(x), 3))  # noqa: E731
    result = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf), draws=7))(KEY, constant, x, y)
    np.testing.assert_array_equal(result.x, x)
    np.testing.assert_array_equal(result.queries, 8)
    # A starting point of a label that is not wanted costs one more.
    given = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf), draws=7, start_points=x))(KEY, constant, x, y)
    np.testing.assert_array_equal(given.queries, 9)


def test_a_starting_point_of_the_wrong_label_is_replaced_by_a_random_one():
    x, y, logits_fn, _ = problem()
    x_adv = hop_skip_jump(KEY, logits_fn, x, y, threat=jn.L2(jnp.inf, -20.0, 20.0), queries=200, start_points=x)
    assert (jnp.argmax(logits_fn(x_adv), axis=1) != y).all()


@every_threat
def test_a_result_beyond_epsilon_is_the_clean_row(cls):
    x, y, logits_fn, distances = problem()
    epsilon = float(np.median(distances[cls])) * 1.1
    x_adv = hop_skip_jump(KEY, logits_fn, x, y, threat=cls(epsilon, -20.0, 20.0), queries=2000)
    references.assert_inside(cls(epsilon, -20.0, 20.0), x_adv, x)
    moved = np.asarray((x_adv != x).any(axis=1))
    assert moved[distances[cls] < 0.9 * epsilon].all()
    assert not moved[distances[cls] > epsilon].any()


def exactly(x):
    """Powers of two: the lead comes out the same whatever the order of the sum, so that no label hangs on rounding."""
    return jnp.stack([x[:, 0] * 0, 2.0 - x[:, 0] - 0.5 * x[:, 1]], axis=1)


@pytest.mark.slow
@every_threat
def test_rows_do_not_depend_on_the_batch(cls):
    x = problem()[0]
    y = jnp.argmax(exactly(x), axis=1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(ROWS))
    attack = with_queries(partial(hop_skip_jump, threat=cls(jnp.inf, -20.0, 20.0), queries=400))
    whole = attack(keys, exactly, x, y)
    for rows in (np.arange(1), np.arange(7), np.arange(ROWS)[::-1]):
        part = attack(keys[rows], exactly, x[rows], y[rows])
        np.testing.assert_allclose(part.x, whole.x[rows], atol=1e-4)
        np.testing.assert_array_equal(part.queries, whole.queries[rows])


@pytest.mark.slow
def test_how_many_are_asked_at_once_does_not_matter():
    x = problem()[0]
    y = jnp.argmax(exactly(x), axis=1)
    attack = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf, -20.0, 20.0), queries=300))
    one, other = (attack(KEY, exactly, x, y, at_once=at_once) for at_once in (7, 25))
    np.testing.assert_array_equal(one.queries, other.queries)
    np.testing.assert_allclose(one.x, other.x, atol=1e-3)


@pytest.mark.slow
@every_threat
def test_binary_images_broken_models_and_double_precision(cls, x64):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 3, 3, 1)), jnp.float64)
    y = jnp.zeros(4, jnp.int32)
    lead = lambda x: 3.0 - x.reshape(len(x), -1).sum(axis=1)  # noqa: E731
    models = {
        "plain": lambda x: jnp.stack([lead(x), -lead(x)], axis=1),
        "sometimes NaN": lambda x: jnp.stack([jnp.where(x[:, 0, 0, 0] > 0.5, jnp.nan, lead(x)), -lead(x)], axis=1),
        "NaN": lambda x: jnp.full((len(x), 2), jnp.nan),
    }
    for name, logits_fn in models.items():
        x_adv = hop_skip_jump(KEY, logits_fn, x, y, threat=cls(jnp.inf), queries=150)
        assert x_adv.dtype == jnp.float64
        references.assert_inside(cls(100.0), x_adv, x)
        if name == "NaN":  # without a label nothing is found
            np.testing.assert_array_equal(x_adv, x)


def test_a_model_that_draws_is_asked_anew():
    x, y = jnp.full((4, 3), 0.4), jnp.zeros(4, jnp.int32)
    noisy = Stochastic(lambda key, x: x - jax.random.normal(key, x.shape), KEY)
    result = with_queries(partial(hop_skip_jump, threat=jn.L2(jnp.inf), queries=200))(KEY, noisy, x, y)
    references.assert_inside(jn.L2(10.0), result.x, x)
    assert len(np.unique(np.asarray(result.queries))) > 1


def test_bad_arguments_raise():
    x, y, logits_fn, _ = problem()
    with pytest.raises(ValueError, match="L2 and Linf, got L1"):
        hop_skip_jump(KEY, logits_fn, x, y, threat=jn.L1(1.0))
    with pytest.raises(ValueError, match="at_once=0"):
        hop_skip_jump(KEY, logits_fn, x, y, threat=jn.L2(1.0), at_once=0)
    with pytest.raises(ValueError, match="queries must be a scalar or have one entry"):
        hop_skip_jump(KEY, logits_fn, x, y, threat=jn.L2(1.0), queries=jnp.ones(3))
    with pytest.raises(ValueError, match="start_points must have the shape of x"):
        hop_skip_jump(KEY, logits_fn, x, y, threat=jn.L2(1.0), start_points=x[:2])
    with pytest.raises(ValueError, match="finite box"):
        hop_skip_jump(KEY, logits_fn, x, y, threat=jn.L2(1.0, -jnp.inf, jnp.inf))
