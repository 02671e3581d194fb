"""Several networks in one step: each comes out as alone, in the step and in the loop, best and last."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets.averaging import ema, init_average, with_average
from jaxnets.checkpoint import Checkpoints
from jaxnets.data import Split
from jaxnets.fit import fit, restore_best
from jaxnets.metrics import read_metrics
from jaxnets.sweeps import _faster, in_turn, member, stack, sweep, write_members
from jaxnets.training import init_state, make_free_step, make_step, scheduled
from jaxnets.types import Batch


class Small(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6)(x.reshape(len(x), -1))
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))


NET = jn.from_linen(Small())
RNG = np.random.default_rng(0)
BATCHES = [
    Batch(jnp.asarray(RNG.uniform(0, 1, (3, 8, 4)), jnp.float32), jnp.asarray(RNG.integers(0, 3, (3, 8))))
    for _ in range(3)
]
PGD = partial(jn.attacks.pgd, steps=2)


def starts(optimizers, seeds=(0, 1, 2)):
    keys = [jax.random.key(seed) for seed in seeds]
    return [
        init_state(key, *NET.init(key, jnp.zeros((1, 4))), optimizer)
        for key, optimizer in zip(keys, optimizers, strict=True)
    ]


def same(got, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), *(_plain(tree) for tree in (got, expected)))


def _plain(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


def by_rate(rate):
    return make_step(jn.objectives.standard(NET), optax.sgd(rate, momentum=0.9))


def by_seed(_):
    return by_rate(0.3)


def by_epsilon(threat):
    return make_step(jn.objectives.adversarial(NET, partial(PGD, threat=threat)), optax.sgd(0.3))


def by_beta(beta):
    attack = partial(PGD, threat=jn.Linf(0.1), start=jn.attacks.gaussian())
    return make_step(jn.objectives.trades(NET, attack, beta=beta), optax.sgd(0.1))


def averaged(rate):
    return with_average(make_step(jn.objectives.standard(NET), optax.sgd(rate)), ema(0.5))


def rising(setting):
    """An epsilon that rises with the steps, to another height for each."""
    threat = lambda t: jn.Linf(setting * t / 3)  # noqa: E731
    return scheduled(lambda t: by_epsilon(threat(t)))


def replayed(threat):
    return make_free_step(jn.objectives.standard(NET), optax.sgd(0.1), threat=threat, replays=2)


MOMENTUM, PLAIN = optax.sgd(0.3, momentum=0.9), optax.sgd(0.3)
KINDS = {
    "seeds": (by_seed, (), MOMENTUM, lambda state: state),
    "learning rates": (by_rate, jnp.array([0.1, 0.3, 0.5]), MOMENTUM, lambda state: state),
    "epsilons": (by_epsilon, jn.Linf(jnp.array([0.0, 0.1, 0.3])), PLAIN, lambda state: state),
    "betas": (by_beta, jnp.array([0.0, 1.0, 6.0]), PLAIN, lambda state: state),
    "averages": (averaged, jnp.array([0.1, 0.3, 0.5]), PLAIN, init_average),
    "schedules": (rising, jnp.array([0.0, 0.1, 0.3]), PLAIN, lambda state: state),
    "free": (
        replayed,
        jn.Linf(jnp.array([0.0, 0.1, 0.3])),
        PLAIN,
        lambda state: state._replace(perturbation=jnp.zeros((8, 4))),
    ),
}


PAIRS = [
    *[(kind, in_turn) for kind in KINDS],
    ("epsilons", jax.vmap),
    *[pytest.param(kind, jax.vmap, marks=pytest.mark.slow) for kind in KINDS if kind != "epsilons"],
]


def of(number):
    return lambda leaf: leaf[number]


@pytest.mark.parametrize(("kind", "over"), PAIRS)
def test_a_member_comes_out_as_it_does_alone(kind, over):
    step_of, settings, optimizer, begin = KINDS[kind]
    states = [begin(state) for state in starts([optimizer] * 3)]
    together, swept = stack(states), jax.jit(chex.assert_max_traces(sweep(step_of, settings, over=over), n=1))
    seen = []
    for batches in BATCHES:
        together, metrics = swept(together, batches)
        seen.append(metrics)
    alone = jax.jit(lambda setting, state, batch: step_of(setting)(state, batch))
    for number in (0, 2):
        state, setting = states[number], jax.tree.map(of(number), settings)
        for batches, metrics in zip(BATCHES, seen, strict=True):
            state, expected = alone(setting, state, jax.tree.map(of(number), batches))
            same(jax.tree.map(of(number), metrics), expected)
        same(member(together, number), state)
    apart = [np.abs(np.diff(leaf, axis=0)).max() for leaf in jax.tree.leaves(together.params)]
    assert max(apart) > 1e-2


def test_rates_may_be_in_the_states():
    """`optax.inject_hyperparams` keeps them there."""
    optimizers = [optax.inject_hyperparams(optax.sgd)(learning_rate=rate) for rate in (0.1, 0.3, 0.5)]
    step = make_step(jn.objectives.standard(NET), optimizers[0])
    states = starts(optimizers, seeds=(0, 0, 0))
    together, _ = jax.jit(sweep(lambda _: step, ()))(stack(states), BATCHES[0])
    for number, rate in enumerate((0.1, 0.3, 0.5)):
        alone = starts([PLAIN], seeds=(0,))[0]
        step = make_step(jn.objectives.standard(NET), optax.sgd(rate))
        alone, _ = step(alone, jax.tree.map(of(number), BATCHES[0]))
        same(member(together, number).params, alone.params)


# The loop.


ROWS = RNG.integers(0, 3, 26).astype(np.int32)
SPLIT = Split((RNG.integers(0, 128, (3, 4))[ROWS] + RNG.integers(0, 128, (26, 4))).astype(np.uint8), ROWS)
SCORES = {2: [0.5, 0.1, 0.1], 4: [0.4, 0.2, 0.1], 6: [0.3, 0.3, 0.2], 8: [0.2, 0.3, 0.1]}


def loop(step, state, folder, number=None, **options):
    """Four epochs of two steps; without ``number`` all members score, else the one."""

    def evaluate(state):
        scores = SCORES[int(jnp.max(state.step))]
        return {"robust": scores if number is None else scores[number]}

    settings = {"epochs": 4, "batch_size": 12, "evaluate": evaluate, "score": lambda values: values["robust"]}
    mesh = jn.parallel.data_mesh(jax.devices()[:2])
    return fit(step, state, SPLIT, folder=folder, mesh=mesh, **{**settings, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    states = starts([PLAIN] * 3)
    return states, loop(sweep(by_epsilon, KINDS["epsilons"][1]), stack(states), folder), folder


def test_fit_of_a_sweep_gives_each_member_its_run_alone(trained, tmp_path):
    states, last, folder = trained
    alone = loop(by_epsilon(jn.Linf(0.1)), states[1], tmp_path, 1)
    same(member(last, 1), alone)
    rows, expected = list(read_metrics(folder / "metrics.jsonl")), list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(
            [row[name][1] for name in row if name != "step"], list(other.values())[1:], rtol=1e-4
        )
    best, score = restore_best(tmp_path, states[1])
    bests, scores = restore_best(folder, last)
    same(member(bests, 1), best)
    assert scores[1] == score == 0.3
    assert bests.step.tolist() == [2, 6, 6]
    np.testing.assert_array_equal(_plain(bests.key), _plain(last.key))


def test_a_sweep_stopped_and_continued_equals_one_never_stopped(trained, tmp_path):
    states, last, folder = trained
    step = sweep(by_epsilon, KINDS["epsilons"][1])
    loop(step, stack(states), tmp_path, epochs=2)
    again = loop(step, stack(states), tmp_path)
    same(again, last, rtol=0, atol=0)
    same(restore_best(tmp_path, last), restore_best(folder, last), rtol=0, atol=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_each_member_becomes_a_run_of_its_own(trained, tmp_path):
    states, last, folder = trained
    folders = [tmp_path / str(number) for number in range(3)]
    # One was begun alone, to an earlier step and a better score.
    for kept, step in (("checkpoints", 1), ("best", 9)):
        begun = states[1]._replace(step=jnp.int32(step))
        Checkpoints(folders[1] / kept).save(step, begun if kept == "checkpoints" else (begun, np.float64(0.9)))
    for _ in range(2):  # a second time, as after a kill
        write_members(folder, last, folders)
    rows, together = list(read_metrics(folders[1] / "metrics.jsonl")), list(read_metrics(folder / "metrics.jsonl"))
    assert rows == [{name: value[1] if name != "step" else value for name, value in row.items()} for row in together]
    best, score = restore_best(folders[1], states[1])
    assert (best.step, score) == (6, 0.3)
    same(best, member(restore_best(folder, last)[0], 1), rtol=0, atol=0)
    again = loop(by_epsilon(jn.Linf(0.1)), states[1], folders[1], 1)
    same(again, member(last, 1), rtol=0, atol=0)
    assert list(read_metrics(folders[1] / "metrics.jsonl")) == rows


def test_a_member_that_diverges_leaves_the_others_alone(tmp_path):
    states, rates = starts([MOMENTUM] * 3), jnp.array([0.1, np.inf, 0.3])
    last = loop(sweep(by_rate, rates), stack(states), tmp_path, epochs=2)
    finite = [np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(last.params)]
    assert np.logical_and.reduce(finite).tolist() == [True, False, True]
    with pytest.raises(FloatingPointError, match=r"the loss is \[nan, nan, nan\] at step 2"):
        loop(sweep(by_rate, jnp.full(3, np.inf)), stack(states), tmp_path / "all")


def test_members_that_could_not_draw_together_go_in_turn(monkeypatch):
    """As they must with keys of other kinds than threefry, of which `jax.vmap` draws all from the first."""
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("jax.device_count", lambda: 1)
    chosen = [_faster(jax.random.split(jax.random.key(0, impl=kind), 3)) for kind in ("threefry2x32", "rbg")]
    assert chosen == [jax.vmap, in_turn]
