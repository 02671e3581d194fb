"""Square attack: its moves against the paper's algorithms in numpy, its schedule, its queries, and what it finds."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.tree_util import Partial
from references import assert_inside

import jaxnets as jn
from jaxnets.attacks.parts.calling import row_keys
from jaxnets.attacks.parts.compaction import until_done
from jaxnets.attacks.parts.queries import with_queries

# The function has the name of its module.
module = importlib.import_module("jaxnets.attacks.square")
square = with_queries(module.square)
THREATS = {"Linf": jn.Linf(0.2), "L2": jn.L2(0.8), "L1": jn.L1(2.5)}
every_threat = pytest.mark.parametrize("name", THREATS)
KEY = jax.random.key(0)
SHAPE = (5, 7, 2)


def images(rows, shape=SHAPE, seed=0):
    """Rows many of whose pixels lie on the faces of the box."""
    random = np.random.default_rng(seed)
    return jnp.asarray(np.clip(random.uniform(-0.3, 1.3, size=(rows, *shape)), 0, 1), jnp.float32)


def linear(weights, offset, x):
    """Class 1 leads class 0 by ``<weights, x - 1/2> + offset``."""
    lead = jnp.sum((x - 0.5) * weights, axis=range(1, x.ndim)) + offset
    return jnp.stack([jnp.zeros_like(lead), lead], axis=1)


def fortress(x):
    """Never wrong about class 0, and the loss depends on the point."""
    return linear(jnp.asarray(np.random.default_rng(9).normal(size=x.shape[1:]), x.dtype), -1000.0, x)


def zeros(rows):
    return jnp.zeros(rows, jnp.int32)


# The schedule, trap 28.


@pytest.mark.parametrize(
    ("queries", "proposal", "halvings"),
    [(10000, 0, 0), (10000, 10, 0), (10000, 11, 1), (10000, 50, 1), (10000, 51, 2), (10000, 201, 3), (10000, 501, 4),
     (10000, 1001, 5), (10000, 2001, 6), (10000, 4001, 7), (10000, 6001, 8), (10000, 8000, 8), (10000, 8001, 9),
     (1000, 1, 0), (1000, 2, 1), (1000, 5, 1), (1000, 6, 2), (1000, 800, 8), (1000, 801, 9), (5000, 4001, 9)],
)  # fmt: skip
def test_side_of_the_square(queries, proposal, halvings):
    for size in ((32, 32), (28, 28), (20, 50)):
        expected = np.clip(round(np.sqrt(0.8 / 2**halvings * size[0] * size[1])), 1, min(size))
        assert module._side(jnp.asarray(proposal), queries, 0.8, size) == expected


# The moves, against the algorithms of the paper written with slices, in double precision.


def pyramid(height, width, decay):
    """Squares around the middle, each one wider, that add ``1 / k^decay``."""
    out, middle = np.zeros((height, width)), (height // 2, width // 2)
    for layer in range(max(height, width) // 2 + 1):
        top, left = (max(centre - layer, 0) for centre in middle)
        out[top : middle[0] + layer + 1, left : middle[1] + layer + 1] += 1 / (layer + 1) ** decay
    return out


def unit(values, power):
    size = (np.abs(values) ** power).sum() ** (1 / power)
    return values / size if size else values


def pair(side, power, decay, turned):
    out, half = np.zeros((side, side)), side // 2
    out[:half] = unit(pyramid(half, side, decay), power)
    out[half:] = -unit(pyramid(side - half, side, decay), power)
    out = unit(out, power)
    return out.T if turned else out


def algorithm_3(x, x_t, epsilon, corner, other, side, turned, signs, power, decay):
    nu, channels = x_t - x, x.shape[2]
    (r1, c1), (r2, c2) = corner, other
    one, two = np.s_[r1 : r1 + side, c1 : c1 + side], np.s_[r2 : r2 + side, c2 : c2 + side]
    both = np.zeros(x.shape[:2], bool)
    both[one], both[two] = True, True
    unused = max(epsilon**power - (np.abs(nu) ** power).sum(), 0)
    out = nu.copy()
    for i in range(channels):
        temporary = signs[i] * pair(side, power, decay, turned) + unit(nu[..., i][one], power)
        available = ((np.abs(nu[..., i][both]) ** power).sum() + unused / channels) ** (1 / power)
        out[..., i][two] = 0
        out[..., i][one] = unit(temporary, power) * available * (channels if power == 1 else 1)
    return x + out


def draws_for(shape, side, corner, other, turned, signs):
    """Uniform numbers that give these corners, this turn and these signs."""
    free = np.array(shape[:2]) - side + 1
    corners = (np.concatenate([corner, other]) + 0.5) / np.concatenate([free, free])
    return jnp.asarray([*corners, 0.25 if turned else 0.75, *np.where(np.array(signs) > 0, 0.75, 0.25)], jnp.float32)


@pytest.mark.parametrize(("cls", "power", "decay"), [(jn.L2, 2, 2), (jn.L1, 1, 4)], ids=["L2", "L1"])
@pytest.mark.parametrize("shape", [(6, 9, 3), (9, 7, 1), (2, 5, 1), (1, 4, 2)])
def test_window_moves_mass_as_in_algorithm_3(cls, power, decay, shape):
    random = np.random.default_rng(0)
    epsilon, move = 1.5, jax.jit(module._shift)
    for asked, turned in ((1, False), (4, True), (5, False), (5, True)):
        side = min(max(asked, 3) // 2 * 2 + 1, *shape[:2])
        x = random.uniform(size=shape)
        delta = random.normal(size=shape)
        delta *= 0.9 * epsilon / (np.abs(delta) ** power).sum() ** (1 / power)
        corner, other = ([random.integers(0, n - side + 1) for n in shape[:2]] for _ in range(2))
        signs = random.choice([-1, 1], shape[2])
        draws = draws_for(shape, side, corner, other, turned, signs)
        expected = algorithm_3(x, x + delta, epsilon, corner, other, side, turned, signs, power, decay)
        if power == 1:
            expected = references.project(1, expected, x, epsilon, -9, 9)
        moved = move(cls(epsilon, -9.0, 9.0), draws, asked, *(jnp.asarray(v, jnp.float32) for v in (x, x + delta)))
        np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_window_of_linf_takes_one_colour_a_channel_and_never_the_one_it_has():
    random, shape, epsilon = np.random.default_rng(0), (6, 9, 3), 0.2
    x = random.uniform(size=shape).astype(np.float32)
    low, high = np.maximum(x - np.float32(epsilon), 0), np.minimum(x + np.float32(epsilon), 1)
    x_t = np.where(random.random((1, *shape[1:])) < 0.5, low, high)
    signs = np.array([1, -1, 1])
    for side, corner in ((3, (3, 6)), (1, (0, 8)), (6, (0, 2))):
        window = np.zeros((*shape[:2], 1), bool)
        window[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = True
        draws = draws_for(shape, side, corner, (0, 0), False, signs)
        moved = module._recolour(jn.Linf(epsilon), draws, side, x, x_t)
        expected = np.where(window, np.where(signs > 0, high, low), x_t)
        assert not np.array_equal(expected, x_t)
        np.testing.assert_array_equal(moved, expected)
        again = module._recolour(jn.Linf(epsilon), draws, side, x, expected)
        np.testing.assert_array_equal(again, np.where(window, np.where(signs > 0, low, high), expected))


def test_corners_are_uniform_over_all_places():
    keys, x = row_keys(KEY, 100), jnp.zeros((4, 6, 1))
    draws = jax.vmap(lambda key: module._draws(key, 1))(keys).reshape(-1, 6)
    assert len(draws) == 6400
    corners = jax.vmap(lambda one: module._corner(one[:2], jnp.asarray(3), x))(draws)
    places, counts = np.unique(np.asarray(corners), axis=0, return_counts=True)
    np.testing.assert_array_equal(places, [[r, c] for r in range(2) for c in range(4)])
    assert abs(counts / 800 - 1).max() < 0.15
    edge = module._corner(jnp.full(2, 1 - 2.0**-24), jnp.asarray(3), x)
    np.testing.assert_array_equal(edge, [1, 3])


# The start.


@pytest.mark.parametrize("shape", [(5, 7, 2), (9, 4, 1), (6, 6)])
def test_linf_starts_with_vertical_stripes(shape):
    x, threat = images(20, shape), jn.Linf(0.2)
    result = square(KEY, fortress, x, zeros(20), threat=threat, queries=2)
    start = np.asarray(result.x)
    up, down = np.isclose(start, np.minimum(x + 0.2, 1)), np.isclose(start, np.maximum(x - 0.2, 0))
    assert (up | down).all()
    for one in (up, down):
        assert one.all(axis=1).any()
        np.testing.assert_array_equal(one.any(axis=1), one.all(axis=1))
    assert len(np.unique(up[:, 0].reshape(20, -1), axis=0)) > 5
    np.testing.assert_array_equal(result.queries, 2)


@pytest.mark.parametrize(("cls", "power", "decay"), [(jn.L2, 2, 2), (jn.L1, 1, 4)], ids=["L2", "L1"])
def test_l2_and_l1_start_with_tiles_of_pyramids(cls, power, decay):
    """In a box that is wide nothing is cut: the tiles can be read off."""
    shape, rows = (10, 17, 2), 6
    x = jnp.zeros((rows, *shape))
    threat = cls(1000.0, -1e6, 1e6)
    start = np.asarray(square(KEY, fortress, x, zeros(rows), threat=threat, queries=2).x)
    assert_inside(threat, start, x)
    tiles = [pair(2, power, decay, turned) * sign for turned in (False, True) for sign in (1, -1)]
    seen = set()
    for row, channel, r, c in np.ndindex(rows, 2, 5, 8):
        tile = unit(start[row, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2, channel], power)
        (match,) = [number for number, one in enumerate(tiles) if np.allclose(tile, one, atol=1e-4)]
        seen.add(match)
    assert seen == {0, 1, 2, 3}
    assert (start[:, :, 16] == 0).all()


# Queries.


CALLS = []


def recorded(logits_fn, x):
    """The model, which also writes down its margins for class 0 in CALLS, ``[B]`` a call."""
    logits = logits_fn(x)
    jax.debug.callback(lambda margin: CALLS.append(np.array(margin)), logits[:, 1] - logits[:, 0], ordered=True)
    return logits


def ask_and_record(logits_fn, x, y, **options):
    """The attack's result, and the margins at each call of the model."""
    CALLS.clear()
    result = square(KEY, Partial(recorded, Partial(logits_fn)), x, y, **options)
    jax.effects_barrier()
    return result, np.array(CALLS)


def test_rows_that_are_fooled_already_cost_one_query_and_are_returned_as_they_are():
    x = images(3)
    result, calls = ask_and_record(fortress, x, zeros(3) + 1, threat=jn.Linf(0.2), queries=100)
    np.testing.assert_array_equal(result.x, x)
    np.testing.assert_array_equal(result.queries, 1)
    assert len(calls) == 1


@pytest.mark.parametrize("queries", [1, 2, 3, 63, 64, 65, 130])
def test_rows_that_are_never_fooled_cost_the_budget(queries):
    x = images(3)
    result, calls = ask_and_record(fortress, x, zeros(3), threat=jn.Linf(0.2), queries=queries)
    np.testing.assert_array_equal(result.queries, queries)
    assert len(calls) == queries
    # The best since the start is returned, and nothing worse is ever gone on from.
    best = calls[min(1, queries - 1) :].max(axis=0)
    np.testing.assert_allclose(fortress(result.x)[:, 1], best, rtol=1e-6)


@every_threat
def test_a_row_stops_at_its_first_success(name):
    x = images(12)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
    offset = -jnp.sum((x - 0.5) * weights, axis=(1, 2, 3)) - jnp.linspace(-0.01, 2.5, 12).at[11].set(50)
    logits_fn = Partial(linear, weights, offset)
    result, margins = ask_and_record(logits_fn, x, zeros(12), threat=THREATS[name], queries=150)
    fooled = margins > 0
    first = np.where(fooled.any(axis=0), fooled.argmax(axis=0) + 1, 150)
    np.testing.assert_array_equal(result.queries, first)
    assert len(np.unique(first)) > 4
    assert first.min() == 1
    assert first.max() == 150
    final = linear(weights, offset, result.x)[:, 1]
    np.testing.assert_allclose(final, np.where(fooled.any(axis=0), margins[first - 1, range(12)], final), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(final) > 0, fooled.any(axis=0))


def test_without_the_count_it_is_an_attack():
    x, y = images(2), zeros(2)
    plain = module.square(KEY, fortress, x, y, threat=jn.Linf(0.2), queries=5)
    np.testing.assert_array_equal(plain, square(KEY, fortress, x, y, threat=jn.Linf(0.2), queries=5).x)


# Rows, and how they leave the batch.


def test_rows_go_on_in_smaller_batches():
    """Against a plain loop: rows end at step 0 to 39, or never."""
    random = np.random.default_rng(0)
    ends, sizes = jnp.asarray(random.integers(0, 60, 203)), []

    def count(number, ends, carry):
        sizes.append(len(ends))
        going = carry[0] < ends
        return carry[0] + going, carry[1] + jnp.where(going, number * ends, 0), ends

    start = (zeros(203), zeros(203), ends)
    done = lambda carry: carry[0] >= carry[2]  # noqa: E731
    steps, sums, _ = jax.jit(lambda ends, end: until_done(count, done, end, ends, start))(ends, 40)
    np.testing.assert_array_equal(steps, np.minimum(ends, 40))
    np.testing.assert_array_equal(sums, [end * sum(range(min(end, 40))) for end in np.asarray(ends)])
    assert sorted(set(sizes)) == [50, 101, 203]


@pytest.mark.slow
@every_threat
def test_rows_do_not_depend_on_the_batch(name):
    """70 rows, of which most are fooled soon, so that the rest go on in a smaller batch."""
    x, keys = images(70, (4, 6, 1)), row_keys(KEY, 70)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 1)), jnp.float32)
    levels = jnp.where(jnp.arange(70) % 3 == 0, 50.0, jnp.linspace(0.1, 0.8, 70))
    shift = jnp.sum((x - 0.5) * weights, axis=(1, 2, 3)) + levels

    def attack(rows):
        # The level of a row hides in its target: a distribution may be one.
        target = jnp.stack([1 + shift[rows], jnp.zeros(len(rows))], axis=1)
        loss = lambda logits, target: logits[:, 1] - target[:, 0]  # noqa: E731
        logits_fn = partial(linear, weights, 0.0)
        return square(keys[rows], logits_fn, x[rows], target, threat=THREATS[name], queries=90, loss=loss)

    whole = attack(jnp.arange(70))
    for rows in (jnp.arange(70)[::-1], jnp.arange(7)) if name == "Linf" else (jnp.arange(7),):
        part = attack(rows)
        np.testing.assert_allclose(part.x, whole.x[rows], atol=1e-6)
        np.testing.assert_array_equal(part.queries, whole.queries[rows])


# What it finds.


def test_linf_reaches_the_closed_form_on_a_linear_model():
    shape, epsilon = (4, 5, 2), 0.3
    x, weights = images(6, shape) * 10 - 5, np.random.default_rng(1).normal(size=shape)
    logits_fn = Partial(linear, jnp.asarray(weights, jnp.float32), -1000.0)
    result = square(KEY, logits_fn, x, zeros(6), threat=jn.Linf(epsilon, -50.0, 50.0), queries=2500)
    gain = np.sum((np.asarray(result.x, np.float64) - np.asarray(x)) * weights, axis=(1, 2, 3))
    best = epsilon * np.abs(weights).sum()
    assert (gain >= 0.97 * best).all()
    assert (gain <= (1 + 1e-5) * best).all()


@pytest.mark.parametrize(("name", "share"), [("L2", 0.7), ("L1", 0.5)])
def test_l2_and_l1_gain_on_a_smooth_linear_model(name, share):
    """What it looks for has smooth parts: here a bump each way."""
    shape, threat = (12, 12, 1), type(THREATS[name])(2.0, -50.0, 50.0)
    r, c = np.mgrid[:12, :12]
    weights = sum(s * np.exp(-((r - i) ** 2 + (c - j) ** 2) / 6) for s, i, j in ((1, 3, 4), (-1, 7, 4)))[..., None]
    logits_fn = Partial(linear, jnp.asarray(weights, jnp.float32), -1000.0)
    x = images(6, shape)
    result = square(KEY, logits_fn, x, zeros(6), threat=threat, queries=1000)
    gain = np.sum((np.asarray(result.x, np.float64) - np.asarray(x)) * weights, axis=(1, 2, 3))
    best = 2.0 * (np.linalg.norm(weights) if name == "L2" else np.abs(weights).max())
    assert (gain >= share * best).all()
    assert (gain <= (1 + 1e-5) * best).all()


@pytest.mark.slow
@every_threat
@pytest.mark.parametrize("shape", [(5, 7, 2), (1, 1, 3), (2, 9)])
def test_result_is_inside_and_of_the_shape_of_x(name, shape):
    for lower, upper in ((0.0, 1.0), (-1.0, 3.0)):
        x = images(4, shape) * (upper - lower) + lower
        threat = type(THREATS[name])(THREATS[name].epsilon * jnp.array([1.0, 0.0, 0.3, 50.0]), lower, upper)
        result = square(KEY, fortress, x, zeros(4), threat=threat, queries=40)
        assert result.x.shape == x.shape
        assert result.x.dtype == x.dtype
        assert_inside(threat, result.x, x)
        np.testing.assert_array_equal(result.x[1], x[1])
        assert np.abs(result.x - x).max() > 1e-3


@every_threat
def test_binary_images_move(name):
    x = jnp.round(images(4, (8, 8, 1)))
    result = square(KEY, fortress, x, zeros(4), threat=THREATS[name], queries=40)
    assert_inside(THREATS[name], result.x, x)
    moved = np.abs(np.asarray(result.x - x)) > 1e-4
    assert (moved & (np.asarray(x) == 0)).any()
    assert (moved & (np.asarray(x) == 1)).any()


@pytest.mark.slow
@every_threat
def test_constant_and_nan_logits(name):
    x = images(4)
    for value in (0.0, jnp.nan):
        constant = Partial(lambda value, x: jnp.full((len(x), 3), value), value)
        result = square(KEY, constant, x, zeros(4), threat=THREATS[name], queries=9)
        assert_inside(THREATS[name], result.x, x)
        np.testing.assert_array_equal(result.queries, 9)


def scaled(scale, x):
    return scale * fortress(x)


def test_scaled_logits_give_the_same_search():
    x = images(4)
    results = [
        square(KEY, Partial(scaled, scale), x, zeros(4), threat=jn.Linf(0.2), queries=60).x
        for scale in (1.0, 2.0**-60, 2.0**60)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_targeted():
    x = images(8)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*SHAPE, 3)), jnp.float32)
    logits_fn = Partial(lambda weights, x: jnp.einsum("bhwc,hwck->bk", x - 0.5, weights), weights)
    ranks = jnp.argsort(logits_fn(x), axis=1)
    attack = partial(square, threat=jn.Linf(0.5), queries=300, loss=jn.losses.targeted(jn.losses.cross_entropy))
    result = attack(KEY, logits_fn, x, ranks[:, 0])
    reached = logits_fn(result.x).argmax(axis=1) == ranks[:, 0]
    assert reached.all()
    assert result.queries.min() > 1
    np.testing.assert_array_equal(attack(KEY, logits_fn, x, ranks[:, 2]).queries, 1)


def test_a_random_model_draws_anew_at_each_query():
    calls = []

    def draw(key, x):
        jax.debug.callback(lambda u: calls.append(float(u)), jax.random.uniform(key))
        return fortress(x)

    square(KEY, jn.attacks.Stochastic(draw, KEY), images(2), zeros(2), threat=jn.Linf(0.2), queries=70)
    jax.effects_barrier()
    assert len(calls) == len(set(calls)) == 140


@pytest.mark.slow
@every_threat
def test_double_precision(name, x64):
    x, threat = images(3).astype(jnp.float64), THREATS[name]
    result = square(KEY, fortress, x, zeros(3), threat=threat, queries=40)
    assert result.x.dtype == jnp.float64
    assert_inside(threat, result.x, x, tolerance=1e-12)


def test_new_budgets_sizes_and_epsilons_mean_no_new_trace():
    traces = []

    def counted(x):
        traces.append(0)
        return fortress(x)

    x, logits_fn = images(3), Partial(counted)
    square(KEY, logits_fn, x, zeros(3), threat=jn.Linf(0.2), queries=40)
    first = len(traces)
    other = square(KEY, logits_fn, 1 - x, zeros(3), threat=jn.Linf(0.1), queries=30, p_init=0.3)
    assert 0 < first == len(traces)
    np.testing.assert_array_equal(other.queries, 30)


def test_under_an_outer_jit_and_vmap_over_epsilon():
    x, epsilons = images(3), jnp.array([0.1, 0.3])
    attack = lambda epsilon: square(KEY, fortress, x, zeros(3), threat=jn.Linf(epsilon), queries=20)  # noqa: E731
    swept = jax.jit(jax.vmap(attack))(epsilons)
    for number, epsilon in enumerate(epsilons):
        np.testing.assert_allclose(swept.x[number], attack(epsilon).x, atol=1e-6)


def test_bad_arguments_raise():
    x, y = images(3), zeros(3)
    with pytest.raises(ValueError, match="queries=0"):
        square(KEY, fortress, x, y, threat=jn.Linf(0.1), queries=0)
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, C\] or \[B, H, W\], got shape \[3, 70\]"):
        square(KEY, fortress, x.reshape(3, -1), y, threat=jn.Linf(0.1))
    with pytest.raises(ValueError, match="Linf, L2 and L1, got None"):
        square(KEY, fortress, x, y, threat=type("Other", (), {"epsilon": 0.1, "__repr__": lambda self: "None"})())
