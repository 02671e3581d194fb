"""The cascade on an attack whose victims are known: rows are broken by number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.attacks.cascade import cascade
from jaxnets.attacks.parts.on_host import _batches, attack_rows, host_keys
from jaxnets.attacks.parts.queries import Queried, counts_queries

KEY = jax.random.key(0)
ROWS = 43


def model(x):
    """Class 1 where the first coordinate is above one half."""
    return jnp.stack([0.5 - x[:, 0], x[:, 0] - 0.5], axis=1)


def rows():
    """Rows of class 0, each of which carries its number in its last coordinate."""
    x = np.zeros((ROWS, 3), np.float32)
    x[:, 2] = np.arange(ROWS) / ROWS
    return x, np.zeros(ROWS, np.int32)


def breaks(low, high, seen=None):
    """Breaks the rows with numbers in ``[low, high)``; others move too, which must leave no trace."""

    def attack(key, logits_fn, x, target):
        if seen is not None:
            seen.append((len(x), np.round(np.asarray(x[:, 2]) * ROWS).astype(int)))
        number = jnp.round(x[:, 2] * ROWS)
        hit = (number >= low) & (number < high)
        return x.at[:, 0].set(jnp.where(hit, 1.0, 0.25))

    return attack


def test_every_attack_sees_the_survivors_of_those_before():
    first, second = [], []
    attack = cascade({"first": breaks(0, 20, first), "second": breaks(10, 30, second)}, batch_size=16)
    done = attack.run(KEY, model, *rows())
    assert set(np.concatenate([numbers for _, numbers in first])) == set(range(43))
    assert set(np.concatenate([numbers for _, numbers in second])) == set(range(20, 43))
    np.testing.assert_array_equal(done.survived["first"], np.arange(ROWS) >= 20)
    np.testing.assert_array_equal(done.survived["second"], np.arange(ROWS) >= 30)
    np.testing.assert_array_equal(done.correct, done.survived["second"])
    np.testing.assert_array_equal(done.x[:30, 0], 1)
    np.testing.assert_array_equal(done.x[30:], rows()[0][30:])


def test_few_sizes_of_batches():
    seen = []
    cascade({"a": breaks(0, 17, seen), "b": breaks(0, 43, seen)}, batch_size=32).run(KEY, model, *rows())
    assert {size for size, _ in seen} <= {32, 8}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("n", [0, 1, 5, 22, 40, 64, 65, 150])
def test_batches_have_every_row_once_in_two_sizes_and_little_padding(n, batch_size, devices):
    batches = list(_batches(n, batch_size, devices))
    np.testing.assert_array_equal(np.concatenate([rows[:valid] for rows, valid in batches] or [[]]), np.arange(n))
    sizes = [len(rows) for rows, _ in batches]
    assert len(set(sizes)) <= 2
    assert all(size % devices == 0 for size in sizes)
    assert sum(sizes) <= n + max(n % sizes[0], sizes[-1] - 1) if n else not sizes


def test_nothing_is_traced_anew_where_other_rows_survive():
    traces = []

    def counted(x):
        traces.append(len(x))
        return model(x)

    x = rows()[0]
    weak, strong = (partial(jn.attacks.pgd, threat=jn.Linf(e), steps=2) for e in (0.1, 0.2))
    attack = cascade({"weak": weak, "strong": strong}, batch_size=8)
    left = []
    for start in (0.35, 0.4):
        x[:, 0] = start + 0.2 * np.arange(ROWS) / ROWS
        done = attack.run(KEY, counted, x, (x[:, 0] > 0.5).astype(np.int32))
        left.append(int(done.survived["weak"].sum()))
        traces.append("run")
    assert left[0] != left[1]
    assert traces[-1] == traces[traces.index("run") + 1] == "run"


def test_the_call_is_the_run_and_wrong_rows_stay_as_they_are():
    x, y = rows()
    y[5] = 1
    attack = cascade({"all": breaks(0, ROWS)})
    found = np.asarray(attack(KEY, model, jnp.asarray(x), jnp.asarray(y)))
    np.testing.assert_array_equal(np.delete(found[:, 0], 5), 1)
    np.testing.assert_array_equal(found[5], x[5])


def test_all_broken_before_the_last_attack():
    late = []
    done = cascade({"all": breaks(0, ROWS), "late": breaks(0, 1, late)}).run(KEY, model, *rows())
    assert not late
    assert not done.correct.any()


def test_randomness_depends_on_row_and_attack_alone():
    def noise(key, logits_fn, x, target):
        return x.at[:, 1].set(jax.vmap(jax.random.uniform)(key))

    x, y = rows()
    keys, mesh = host_keys(KEY, ROWS), jn.parallel.data_mesh(jax.devices()[:1])
    run = partial(attack_rows, noise, logits_fn=model, mesh=mesh)
    whole = run(keys, x=x, target=y, batch_size=64).x
    some = np.array([3, 20, 41])
    np.testing.assert_array_equal(run(keys[some], x=x[some], target=y[some], batch_size=2).x, whole[some])
    assert (run(keys, x=x, target=y, batch_size=64, number=1).x[:, 1] != whole[:, 1]).all()


def test_queries_add_up():
    @counts_queries
    def asking(key, logits_fn, x, target, *, times):
        return Queried(breaks(0, 20)(key, logits_fn, x, target), jnp.full(len(x), times))

    attack = cascade({"one": partial(asking, times=3), "none": breaks(0, 0), "two": partial(asking, times=5)})
    np.testing.assert_array_equal(attack.run(KEY, model, *rows()).queries, np.where(np.arange(ROWS) < 20, 3, 8))
    assert cascade({"none": breaks(0, 0)}).run(KEY, model, *rows()).queries is None


def test_evaluation_reports_its_stages():
    x, y = rows()
    y[:4] = 1
    told = []
    attack = cascade({"first": breaks(0, 20), "second": breaks(10, 30)})
    report = jn.evaluation.evaluate(
        KEY, model, x, y, {"both": attack}, threat=jn.Linf(1.0), on_batch=lambda *said: told.append(said)
    )
    assert [int(rows.sum()) for rows in report.survived.values()] == [39, 23, 13, 13]
    assert list(report.survived) == ["clean", "both: first", "both: second", "both"]
    assert sum(done for name, done in told if name == "both: second") == 39
    np.testing.assert_array_equal(report.norms["both"][[0, 10, 40]], [0, 1, np.inf])
    np.testing.assert_allclose(report.accuracy_at("both", [0.5, 1.0]), [39 / 43, 13 / 43])
    assert "both" in report.costs()


def test_refusals():
    with pytest.raises(ValueError, match="at least one attack"):
        cascade({})
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(cascade({"a": breaks(0, 1)}), static_argnums=1)(KEY, model, *map(jnp.asarray, rows()))
