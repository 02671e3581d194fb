"""Steps to a hyperplane inside the box: against linear programming and a quadratic one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy.optimize import linprog, minimize

import jaxnets as jn
from jaxnets.attacks.parts.classes import likeliest_others
from jaxnets.attacks.parts.hyperplane import Hyperplane, distance, linearised, seen_from, step_to

THREATS = {"Linf": jn.Linf, "L2": jn.L2, "L1": jn.L1}
every_threat = pytest.mark.parametrize("cls", THREATS.values(), ids=THREATS)
LOWER, UPPER = -1.0, 2.0


def least_size(order, room_up, room_down, normal, gap):
    """The least norm of a step to the plane by a solver; None where the box holds no point of it."""
    n = len(normal)
    if order == 2:
        reach = np.where(normal * gap > 0, room_up, room_down) @ np.abs(normal)
        if reach < abs(gap):
            return None
        equal = {"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal}
        found = minimize(
            lambda d: d @ d / 2, np.zeros(n), jac=lambda d: d, bounds=list(zip(-room_down, room_up, strict=True)),
            constraints=equal, method="SLSQP", options={"ftol": 1e-13, "maxiter": 500},
        )  # fmt: skip
        assert found.success
        return np.linalg.norm(found.x)
    # Parts up and down, and for Linf a bound on both.
    bounds = [(0, room) for room in np.concatenate([room_up, room_down])]
    plane = np.concatenate([normal, -normal])
    if order == 1:
        found = linprog(np.ones(2 * n), A_eq=plane[None], b_eq=[gap], bounds=bounds)
    else:
        below = np.hstack([np.eye(2 * n), -np.ones((2 * n, 1))])
        cost = np.append(np.zeros(2 * n), 1)
        found = linprog(
            cost, A_ub=below, b_ub=np.zeros(2 * n), A_eq=np.append(plane, 0)[None], b_eq=[gap],
            bounds=[*bounds, (0, None)],
        )  # fmt: skip
    return found.fun if found.status == 0 else None


def cases(rows=40, n=7):
    """Points many of which lie on the box, normals with zeros and ties, gaps of both signs, some out of reach."""
    random = np.random.default_rng(0)
    z = np.clip(random.uniform(-1.6, 2.6, (rows, n)), LOWER, UPPER).astype(np.float32)
    normal = random.normal(size=(rows, n)).astype(np.float32)
    normal[::3, 0] = 0
    normal[1::3, 2] = -normal[1::3, 1]
    return z, normal, (4 * random.normal(size=rows)).astype(np.float32)


def steps(cls, z, normal, gap, **box):
    threat = cls(0.0, **{"lower": LOWER, "upper": UPPER, **box})
    return jax.jit(jax.vmap(lambda *row: step_to(threat, row[0], Hyperplane(row[2], row[1]))))(z, normal, gap)


@every_threat
def test_step_is_the_smallest_that_meets_the_plane_inside_the_box(cls):
    z, normal, gap = (np.asarray(part, np.float64) for part in cases())
    found = np.asarray(steps(cls, *cases()), np.float64)
    assert (z + found >= LOWER - 1e-6).all()
    assert (z + found <= UPPER + 1e-6).all()
    order, unreachable = references.ORDERS[cls.__name__], 0
    for row, step in enumerate(found):
        least = least_size(order, UPPER - z[row], z[row] - LOWER, normal[row], gap[row])
        if least is None:
            unreachable += 1
            towards = np.sign(normal[row] * gap[row])
            corner = np.select([towards > 0, towards < 0], [UPPER - z[row], LOWER - z[row]])
            np.testing.assert_allclose(step, corner, atol=1e-6)
        else:
            np.testing.assert_allclose(normal[row] @ step, gap[row], atol=2e-6)
            np.testing.assert_allclose(np.linalg.norm(step, order), least, rtol=1e-5, atol=1e-6)
    assert 2 < unreachable < 20


@every_threat
def test_step_does_not_change_with_the_scale_of_the_logits(cls):
    z, normal, gap = cases()
    expected = steps(cls, z, normal, gap)
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        scaled = steps(cls, z, np.float32(scale) * normal, np.float32(scale) * gap)
        np.testing.assert_allclose(scaled, expected, rtol=0, atol=2e-5, err_msg=f"scale {scale}")


@every_threat
@pytest.mark.parametrize(("normal", "gap"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (np.nan, 1.0), (1.0, np.nan)], ids=str)
def test_no_plane_no_step(cls, normal, gap):
    z, _, _ = cases(rows=2)
    step = steps(cls, z, np.full_like(z, normal), np.full(2, gap, np.float32))
    np.testing.assert_array_equal(step, np.zeros_like(z))


@every_threat
def test_infinite_gap_leads_to_the_corner(cls):
    step = steps(cls, np.zeros((1, 3), np.float32), np.float32([[1, -2, 0]]), np.float32([np.inf]))
    np.testing.assert_array_equal(step, [[UPPER, LOWER, 0]])


@every_threat
def test_wide_range_of_slopes_and_rooms(cls, x64):
    """Many rounds of the searches: every coordinate meets the box at another time."""
    n = 60
    z, normal = np.zeros((1, n)), 2.0 ** -np.arange(n)[None]
    room = 3.0 ** -np.arange(n)[::-1]
    # A coordinate's own box: by its starting point.
    z = 1 - room[None]
    reach = (normal * room).sum()
    for share in (1e-12, 0.3, 0.999):
        step = np.asarray(steps(cls, z, normal, np.array([share * reach]), lower=0.0, upper=1.0))
        np.testing.assert_allclose(normal[0] @ step[0], share * reach, rtol=1e-6)
        assert (step <= room + 1e-15).all()


@every_threat
def test_rows_do_not_depend_on_the_batch(cls):
    z, normal, gap = cases()
    whole = steps(cls, z, normal, gap)
    for row in (0, 7):
        np.testing.assert_allclose(
            steps(cls, z[row : row + 1], normal[row : row + 1], gap[row : row + 1])[0], whole[row], rtol=0, atol=1e-6
        )


@every_threat
def test_distance_is_the_size_of_the_step_without_a_box(cls):
    _, normal, gap = cases()
    z = np.zeros_like(normal)
    step = steps(cls, z, normal, gap, lower=-1e4, upper=1e4)
    expected = references.norm(references.ORDERS[cls.__name__], step)
    found = jax.vmap(lambda *row: distance(cls(0.0), Hyperplane(*row)))(gap, normal)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert distance(cls(0.0), Hyperplane(jnp.array(1.0), jnp.zeros(3))) == np.inf
    assert distance(cls(0.0), Hyperplane(jnp.array(np.nan), jnp.ones(3))) == np.inf


def test_plane_seen_from_another_point():
    plane = Hyperplane(jnp.array(1.0), jnp.array([2.0, 0.0]))
    assert seen_from(jnp.array([0.25, 9.0]), plane, jnp.zeros(2)).gap == 0.5


@every_threat
def test_linearised_boundary_of_a_linear_model_is_the_nearest(cls):
    random = np.random.default_rng(1)
    weights, x = random.normal(size=(6, 4)).astype(np.float32), random.normal(size=(5, 6)).astype(np.float32)
    target = np.array([0, 1, 2, 3, 1])
    others = likeliest_others(jnp.asarray(x @ weights), jnp.asarray(target))
    logits, plane = linearised(cls(0.0), jn.losses.margin, lambda x: x @ weights, jnp.asarray(x), target, others)
    np.testing.assert_allclose(logits, x @ weights, rtol=1e-5)
    order = references.dual(references.ORDERS[cls.__name__])
    for row, y in enumerate(target):
        normals = weights - weights[:, [y]]
        rates = [abs(x[row] @ normals[:, k]) / np.linalg.norm(normals[:, k], order) if k != y else np.inf
                 for k in range(4)]  # fmt: skip
        nearest = int(np.argmin(rates))
        np.testing.assert_allclose(plane.normal[row], normals[:, nearest], atol=1e-5)
        np.testing.assert_allclose(plane.gap[row], -x[row] @ normals[:, nearest], atol=1e-5)


def test_likeliest_others_leave_the_target_out():
    logits = jnp.array([[-3.0, -1.0, -2.0], [9.0, 9.0, 9.0]])
    np.testing.assert_array_equal(likeliest_others(logits, jnp.array([1, 0]), 1)[0], [2])
    assert 0 not in likeliest_others(logits, jnp.array([1, 0]))[1]
    assert likeliest_others(logits, jnp.array([1, 0]), 99).shape == (2, 2)
    for bad in (
        lambda: likeliest_others(logits, jnp.array([1, 0]), 0),
        lambda: likeliest_others(logits[:, :1], jnp.array([0, 0])),
    ):
        with pytest.raises(ValueError, match="needs another class"):
            bad()
