"""Norm balls in a box: projections against slow references, samples against their distributions, derivatives at 0."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import jaxnets as jn
from jaxnets.threats import each_row

THREATS = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1, "L0": jn.L0}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
NORMS = {name: cls for name, cls in THREATS.items() if name != "L0"}
every_norm = pytest.mark.parametrize("cls", NORMS.values(), ids=NORMS)
seeds = st.integers(0, 2**32 - 1)
FACES = {"lower": -0.25, "upper": 1.5}


def order_of(cls):
    return references.ORDERS[cls.__name__]


def scene(seed, rows=16, n=6, dtype=np.float64):
    """Rows in the box, points anywhere around, a radius each: some inside the ball, some far outside, many on faces."""
    random = np.random.default_rng(seed)
    x = np.clip(random.uniform(-0.6, 2.0, size=(rows, n)), *FACES.values()).astype(dtype)
    reach = 10.0 ** random.uniform(-3, 2, size=(rows, 1))
    z = (x + reach * random.normal(size=x.shape) * random.integers(0, 2, size=x.shape)).astype(dtype)
    return x, z, (10.0 ** random.uniform(-2, 1, size=rows)).astype(dtype)


@cache
def projected(cls, **settings):
    return jax.jit(lambda epsilon, z, x: each_row(cls.project, cls(epsilon, **FACES, **settings), z, x))


def reference_projection(cls, x, z, epsilon):
    one = partial(references.project, order_of(cls))
    return np.stack([one(*row, *FACES.values()) for row in zip(z, x, epsilon, strict=True)])


# The references themselves.


@every_norm
def test_two_references_agree(cls):
    x, z, epsilon = scene(0, rows=12, n=5)
    by_dykstra = [
        references.project_dykstra(order_of(cls), *row, *FACES.values()) for row in zip(z, x, epsilon, strict=True)
    ]
    np.testing.assert_allclose(by_dykstra, reference_projection(cls, x, z, epsilon), rtol=0, atol=2e-4)


# Projection.


@every_threat
@given(seed=seeds)
def test_projection_is_the_nearest_point(cls, seed):
    with jax.enable_x64(True):
        x, z, epsilon = scene(seed)
        np.testing.assert_allclose(
            projected(cls)(epsilon, z, x), reference_projection(cls, x, z, epsilon), rtol=0, atol=1e-8
        )


@every_threat
@given(seed=seeds)
def test_projection_in_single_precision(cls, seed):
    x, z, epsilon = scene(seed, dtype=np.float32)
    once = projected(cls)(epsilon, z, x)
    references.assert_inside(cls(epsilon, **FACES), once, x)
    scale = 1 + np.abs(z).max(axis=1, keepdims=True)
    assert (np.abs(once - reference_projection(cls, x, z, epsilon)) <= 2e-6 * scale).all()
    np.testing.assert_allclose(projected(cls)(epsilon, once, x), once, rtol=0, atol=1e-6)


@every_norm
@given(seed=seeds)
def test_no_other_point_of_the_set_is_nearer(cls, seed):
    """The variational inequality: ``<z - p, q - p> <= 0`` for every feasible ``q``."""
    with jax.enable_x64(True):
        x, z, epsilon = scene(seed, rows=4)
        p = np.asarray(projected(cls)(epsilon, z, x))
        random = np.random.default_rng(seed)
        for row in range(4):
            for _ in range(20):
                somewhere = x[row] + epsilon[row] * random.normal(size=6)
                q = references.project(order_of(cls), somewhere, x[row], epsilon[row], *FACES.values())
                assert (z[row] - p[row]) @ (q - p[row]) <= 1e-6 * (1 + np.abs(z[row]).max())


@every_threat
def test_points_inside_stay_exactly(cls):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 7)), jnp.float32)
    z = jnp.clip(x + 0.01 * jax.random.normal(jax.random.key(0), x.shape), 0, 1)
    np.testing.assert_array_equal(each_row(cls.project, cls(7.0), z, x), z)


@every_threat
def test_coordinates_that_meet_the_box_lie_exactly_on_it(cls):
    """A rounding error away from a face, the next step would push against it."""
    random = np.random.default_rng(1)
    x = random.uniform(0.3, 0.7, size=(64, 12)).astype(np.float32)
    offsets = np.float32([5, 4, 3, -5, -4, -3, 1, 1, 1, -1, -1, -1]) * random.uniform(0.8, 1, x.shape)
    epsilon = {"Linf": 0.8, "L2": 1.65, "L1": 4.5, "L0": 8}[cls.__name__]
    result = np.asarray(each_row(cls.project, cls(epsilon), (x + offsets).astype(np.float32), x))
    near = np.abs(result - np.round(result)) < 1e-5
    assert near.sum() > 5 * 64
    assert np.isin(result[near], (0.0, 1.0)).all()
    if cls not in (jn.Linf, jn.L0):
        assert (~near).sum() > 64, "the ball cuts as well"


@every_threat
def test_rescaling_is_not_what_projects(cls):
    """Where the nearest point is known: half of L1's budget would be lost by rescaling, and the box takes its part."""
    x, z = jnp.zeros(3), jnp.array([3.0, 1.0, 0.0])
    expected = {"Linf": [1.0, 1.0, 0.0], "L2": [3 / 10**0.5, 1 / 10**0.5, 0.0], "L1": [1.0, 0.0, 0.0]}
    expected = {**expected, "L0": [3.0, 0.0, 0.0]}[cls.__name__]
    np.testing.assert_allclose(cls(1.0, lower=-9, upper=9).project(z, x), expected, atol=1e-6)
    boxed = {"Linf": [0.5, 0.5, 0.0], "L2": [0.5, 0.5, 0.0], "L1": [0.5, 0.5, 0.0], "L0": [0.5, 0, 0]}[cls.__name__]
    np.testing.assert_allclose(cls(1.0, lower=-9, upper=0.5).project(z, x), boxed, atol=1e-6)


@every_threat
def test_projection_to_no_budget_is_x(cls):
    x, z, _ = scene(0, dtype=np.float32)
    np.testing.assert_array_equal(projected(cls)(np.zeros(len(x), np.float32), z, x), x)


# Samples.


@every_norm
@pytest.mark.parametrize("n", [1, 3, 20])
def test_samples_are_uniform_in_the_ball(cls, n):
    epsilon, draws = 0.3, 4000
    keys = jax.random.split(jax.random.key(n), draws)
    x = jnp.full(n, 0.5)
    points = np.asarray(jax.jit(jax.vmap(lambda key: cls(epsilon).sample(key, x)))(keys), np.float64)
    offsets = (points - 0.5) / epsilon
    radii = references.norm(order_of(cls), offsets)
    assert radii.max() <= 1 + 1e-5
    # The volume within a radius r is r^n of the whole.
    assert scipy.stats.kstest(np.minimum(radii, 1) ** n, "uniform").pvalue > 1e-3
    marginal = {
        "Linf": lambda u: np.clip(u, 0, 1),
        "L2": lambda u: scipy.stats.beta(0.5, (n + 1) / 2).cdf(np.clip(u, 0, 1) ** 2),
        "L1": lambda u: 1 - (1 - np.clip(u, 0, 1)) ** n,
    }[cls.__name__]
    for coordinate in {0, n - 1}:
        assert scipy.stats.kstest(np.abs(offsets[:, coordinate]), marginal).pvalue > 1e-3
        assert abs((offsets[:, coordinate] > 0).mean() - 0.5) < 0.04
    if n > 1:
        assert abs(np.corrcoef(offsets[:, 0], offsets[:, -1])[0, 1]) < 0.06


@every_norm
def test_samples_of_images_fill_the_ball(cls):
    """In 784 dimensions nearly all volume is at the surface: a radius drawn uniformly would show."""
    x = jnp.full((28, 28, 1), 0.5)
    points = jax.vmap(lambda key: cls(1.0).sample(key, x))(jax.random.split(jax.random.key(0), 50))
    radii = references.norm(order_of(cls), points - x)
    assert (radii > 0.97).all()
    assert (radii <= 1 + 1e-5).all()


# The number of coordinates.


@pytest.mark.parametrize("n", [1, 2, 5])
def test_l0_projection_against_every_choice_of_coordinates(n):
    random = np.random.default_rng(n)
    project = jax.jit(lambda epsilon, z, x: jn.L0(epsilon).project(z, x))
    for count in range(n + 2):
        x, z = random.uniform(size=n), random.normal(0.5, 2, size=n)
        points = [np.where(np.isin(range(n), kept), np.clip(z, 0, 1), x)
                  for size in range(min(count, n) + 1) for kept in itertools.combinations(range(n), size)]  # fmt: skip
        nearest = min(((point - z) ** 2).sum() for point in points)
        for epsilon in (count, count + 0.9):
            found = np.asarray(project(epsilon, jnp.float32(z), jnp.float32(x)), np.float64)
            np.testing.assert_allclose(((found - z) ** 2).sum(), nearest, rtol=1e-5, atol=1e-9)
            assert (found != np.float32(x)).sum() <= count


@given(seed=seeds)
def test_l0_projection_keeps_the_first_of_equals_and_no_more(seed):
    random = np.random.default_rng(seed)
    x, z = np.zeros(40), random.choice([-2e30, -0.5, 0.0, 1e-30, 0.5, 2.0], size=40)
    epsilon = random.integers(0, 42)
    expected = references.project(0, z, x, epsilon, *FACES.values())
    found = projected(jn.L0)(jnp.asarray([epsilon]), jnp.float32(z)[None], jnp.float32(x)[None])
    np.testing.assert_array_equal(found[0], np.float32(expected))


@pytest.mark.parametrize("epsilon", [jnp.inf, 12, jnp.int32(2**31 - 1), 1e12])
def test_l0_budget_beyond_the_number_of_coordinates(epsilon):
    x, z = jnp.zeros((3, 4)), jnp.full((3, 4), 2.0)
    np.testing.assert_array_equal(jn.L0(epsilon).project(z, x), jnp.ones((3, 4)))


def test_l0_size_of_many_coordinates_in_half_precision():
    assert jn.L0(1).size(jnp.ones((300, 300), jnp.bfloat16)) == 90_000


def test_l0_samples_are_uniform_choices_of_uniform_values():
    x, threat = jnp.full((2, 5), 0.25), jn.L0(3.5, lower=-1.0, upper=2.0)
    points = jax.jit(jax.vmap(lambda key: threat.sample(key, x)))(jax.random.split(jax.random.key(0), 4000))
    points = np.asarray(points, np.float64).reshape(4000, 10)
    changed = points != 0.25
    assert (changed.sum(axis=1) == 3).all()
    np.testing.assert_allclose(changed.mean(axis=0), 0.3, atol=0.03)
    assert abs(np.corrcoef(changed.T)[~np.eye(10, dtype=bool)] + 1 / 9).max() < 0.06
    assert scipy.stats.kstest((points[changed] + 1) / 3, "uniform").pvalue > 1e-3


# Direction and size.


@every_threat
@given(seed=seeds)
def test_direction_is_the_steepest_of_size_one(cls, seed):
    random = np.random.default_rng(seed)
    gradient = (10.0 ** random.uniform(-18, 18) * random.normal(size=(3, 4))).astype(np.float32)
    direction = np.asarray(cls(0.1).direction(gradient, jnp.full((3, 4), 0.5)), np.float64)
    order = order_of(cls)
    steepest = np.linalg.norm(gradient.astype(np.float64).ravel(), references.dual(order))
    np.testing.assert_allclose(np.linalg.norm(direction.ravel(), order), 1, rtol=1e-6)
    np.testing.assert_allclose((gradient.astype(np.float64) * direction).sum(), steepest, rtol=1e-5)


@every_threat
def test_direction_does_not_leave_the_box(cls):
    x = jnp.array([0.0, 1.0, 0.0, 1.0, 0.5])
    gradient = jnp.array([-9.0, 9.0, 2.0, -1.0, 0.5])
    expected = references.direction(order_of(cls), np.asarray(gradient, np.float64), np.asarray(x), 0, 1)
    direction = cls(0.1).direction(gradient, x)
    np.testing.assert_allclose(direction, expected, atol=1e-6)
    assert direction[0] == direction[1] == 0


@every_threat
def test_direction_where_every_coordinate_is_held_is_zero(cls):
    x, gradient = jnp.array([0.0, 1.0]), jnp.array([-1.0, 1.0])
    np.testing.assert_array_equal(cls(0.1).direction(gradient, x), [0, 0])


@pytest.mark.parametrize(("top", "expected"), [(1, [0, -1, 0, 0]), (3, [1 / 3, -1 / 3, 0, 1 / 3]), (9, None)])
def test_top_coordinates_share_the_l1_step(top, expected):
    gradient = jnp.array([2.0, -3.0, 0.0, 1.0])
    expected = [1 / 3, -1 / 3, 0, 1 / 3] if expected is None else expected
    np.testing.assert_allclose(jn.L1(1.0, top=top).direction(gradient, jnp.full(4, 0.5)), expected, atol=1e-6)


@every_threat
@given(seed=seeds)
def test_size_is_the_norm(cls, seed):
    random = np.random.default_rng(seed)
    delta = (10.0 ** random.uniform(-20, 18) * random.normal(size=(2, 3, 1))).astype(np.float32)
    np.testing.assert_allclose(cls(0.1).size(delta), references.norm(order_of(cls), delta[None])[0], rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_l1_balls_of_many_coordinates_hold_what_is_projected(scale):
    """Of thousands of coordinates the rounding errors add up: none is rounded away from the clean row."""
    random = np.random.default_rng(0)
    x = np.float32(scale) * (random.integers(0, 256, (16, 3072)) / 255).astype(np.float32)
    threat = jn.L1(12.0 * scale, 0.0, scale)
    found = each_row(jn.L1.project, threat, jnp.asarray(x + scale * random.normal(size=x.shape) / 50, jnp.float32), x)
    sizes = references.norm(1, np.asarray(found, np.float64) - x)
    assert (sizes <= 12 * scale * (1 + 1e-7)).all()
    assert (sizes >= 12 * scale * (1 - 1e-5)).all()


# Derivatives.


@every_threat
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("x", [0.0, 0.5])
def test_derivatives_at_zero_are_finite(cls, epsilon, x):
    threat, x, zero = cls(epsilon), jnp.full(3, x), jnp.zeros(3)
    for function, point in [
        (lambda z: threat.project(z, x), x),
        (lambda x: threat.project(x, x), x),
        (lambda x: threat.project(x + 1, x), x),
        (lambda delta: threat.size(delta), zero),
        (lambda gradient: threat.direction(gradient, x), zero),
    ]:
        assert np.isfinite(jax.jacrev(function)(point)).all()
    assert np.isfinite(jax.grad(lambda e: cls(e).project(x + 1.0, x).sum())(jnp.asarray(epsilon))).all()


@every_threat
@given(seed=seeds)
def test_gradient_of_projection_is_that_of_differences(cls, seed):
    with jax.enable_x64(True):
        x, z, epsilon = scene(seed, rows=6)
        # A coordinate that rests on a face is at a kink of the box, one that rests anywhere at one of L0.
        z = np.where((z == x) & (np.isin(x, list(FACES.values())) | (cls is jn.L0)), 0.9 * z, z)
        random = np.random.default_rng(seed)
        along, weights = random.normal(size=(2, *x.shape))
        value, slope = jax.jvp(lambda z: (weights * projected(cls)(epsilon, z, x)).sum(axis=1), (z,), (along,))
        h = 1e-6
        ahead, behind = ((weights * projected(cls)(epsilon, z + s * h * along, x)).sum(axis=1) for s in (1, -1))
        # Rows at a kink have one-sided slopes that differ.
        smooth = np.abs(ahead + behind - 2 * value) < 1e-9
        np.testing.assert_allclose(slope[smooth], ((ahead - behind) / (2 * h))[smooth], rtol=1e-3, atol=1e-5)


# Lifting to a batch, and threats as pytrees.


@every_threat
def test_a_radius_a_row(cls):
    x, z, epsilon = scene(2, rows=4, dtype=np.float32)
    threat = cls(jnp.asarray(epsilon), **FACES)
    together = each_row(cls.project, threat, z, x)
    alone = [cls(e, **FACES).project(z_i, x_i) for e, z_i, x_i in zip(epsilon, z, x, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6)
    assert np.abs(together - each_row(cls.project, cls(epsilon[0], **FACES), z, x)).max() > 0.01


def test_each_row_keeps_the_type_of_the_rows(x64):
    x = jnp.zeros((2, 3), jnp.float32)
    for cls in THREATS.values():
        assert each_row(cls.project, cls(jnp.float64(0.1)), x + 1, x).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,)])
def test_radii_of_the_wrong_shape_raise(shape):
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"one entry for each of the 3 rows, got \("):
        each_row(jn.Linf.project, jn.Linf(jnp.ones(shape)), x, x)


@every_threat
def test_epsilon_is_the_only_leaf(cls):
    threat = cls(0.25, lower=-1.0, upper=2.0)
    assert jax.tree.leaves(threat) == [0.25]
    assert jax.tree.map(lambda epsilon: 2 * epsilon, threat) == cls(0.5, lower=-1.0, upper=2.0)
    with pytest.raises(AttributeError):
        threat.epsilon = 1.0


def test_threats_of_two_norms_are_different_trees():
    """Were they equal, jit could take the program of one norm for another."""
    trees = [
        jax.tree.structure(cls(0.25)) for cls in (*THREATS.values(), partial(jn.L1, top=2), partial(jn.L2, upper=2.0))
    ]
    assert len(set(trees)) == len(trees)
    for number, tree in enumerate(trees):
        assert [number == other for other in range(len(trees))] == [tree == other for other in trees]


@every_threat
def test_vmap_over_threats_sweeps_epsilon(cls):
    x, z, _ = scene(4, rows=1, dtype=np.float32)
    radii = jnp.linspace(0, 2, 5)
    swept = jax.vmap(lambda e: cls(e, **FACES).project(z[0], x[0]))(radii)
    np.testing.assert_allclose(swept, [cls(e, **FACES).project(z[0], x[0]) for e in radii], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("threat", [jn.L2(300.0, 0, 255), jn.L1(600.0, 0, 255), jn.L0(3)])
def test_half_precision_is_projected_as_single_is(threat, dtype):
    """Of which squares and sums overflow or round."""
    z, x = jnp.full((1, 1024), 255, dtype), jnp.ones((1, 1024), dtype)
    project = lambda dtype: each_row(type(threat).project, threat, z.astype(dtype), x.astype(dtype))  # noqa: E731
    found = project(dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, project(jnp.float32).astype(dtype))


@pytest.mark.parametrize("epsilon", [-0.1, np.array([0.1, -0.1])])
def test_negative_epsilons_are_refused(epsilon):
    x = jnp.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="epsilon must be 0 or more, got"):
        jn.attacks.pgd(jax.random.key(0), lambda x: x, x, jnp.array([0, 1]), threat=jn.Linf(epsilon))


@pytest.mark.parametrize("threat", [jn.L0(2), jn.L1(1.0, top=3), jn.L2(0.5)])
def test_attacks_run_without_jit(threat):
    """As one debugs them."""
    x, y = jnp.linspace(0.1, 0.9, 12).reshape(3, 4), jnp.arange(3)
    attack = partial(
        jn.attacks.pgd, jax.random.key(0), lambda x: x * jnp.arange(1.0, 5.0), x, y, threat=threat, steps=2
    )
    with jax.disable_jit():
        found = attack()
    np.testing.assert_allclose(found, attack(), atol=1e-6)
