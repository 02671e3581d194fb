"""Free adversarial training: its trace in numpy, what is kept over replays and batches, what it costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

import jaxnets as jn
from jaxnets.data import Split
from jaxnets.training import init_state, make_free_step, make_step
from jaxnets.types import Batch

KEY = jax.random.key(0)
NET = jn.from_linen(jn.models.MLP((), 3))
EPSILON = 0.1


def batches():
    random = np.random.default_rng(0)
    return [Batch(random.uniform(0.0, 0.5, (4, 5)), random.integers(0, 3, 4)) for _ in range(3)]


def weights():
    random = np.random.default_rng(1)
    return {"Dense_0": {"kernel": random.normal(size=(5, 3)), "bias": random.normal(size=3)}}


def rate(count):
    """Another one for every update."""
    return 0.5 / (1 + count)


def trace(replays):
    """Parameters and perturbation after every batch, and each batch's mean loss: softmax regression by hand."""
    kernel, bias = weights()["Dense_0"].values()
    delta, count = np.zeros((4, 5)), 0
    for x, y in batches():
        losses = []
        for _ in range(replays):
            x_adv = np.clip(x + delta, 0, 1)
            error = np.exp([references.log_softmax(z) for z in x_adv @ kernel + bias])
            losses.append(-np.log(error[np.arange(4), y]).mean())
            error[np.arange(4), y] -= 1
            moved = x_adv - x + EPSILON * np.sign(error @ kernel.T)
            kernel, bias = kernel - rate(count) * x_adv.T @ error / 4, bias - rate(count) * error.mean(axis=0)
            delta, count = np.clip(moved, np.maximum(-EPSILON, -x), np.minimum(EPSILON, 1 - x)), count + 1
        yield kernel, bias, delta, np.mean(losses)


def start(optimizer):
    state = init_state(KEY, jax.tree.map(jnp.asarray, weights()), {}, optimizer)
    return state._replace(perturbation=jnp.zeros((4, 5)))


def test_step_sizes_and_epsilons_are_one_a_row(x64):
    """Also where there are as many rows as columns."""
    optimizer, batch = optax.sgd(0.0), Batch(batches()[0].x[:, :4], batches()[0].y)
    params = {"Dense_0": {"kernel": jnp.asarray(weights()["Dense_0"]["kernel"][:4]), "bias": jnp.zeros(3)}}
    state = init_state(KEY, params, {}, optimizer)._replace(perturbation=jnp.zeros((4, 4)))
    sizes = jnp.array([0.01, 0.02, 0.03, 0.04])
    for threat, step_size in ((jn.Linf(sizes, -9, 9), None), (jn.Linf(0.1, -9, 9), sizes)):
        step = make_free_step(jn.objectives.standard(NET), optimizer, threat=threat, replays=1, step_size=step_size)
        moved = jax.jit(step)(state, batch)[0].perturbation
        np.testing.assert_allclose(np.abs(moved), np.broadcast_to(sizes[:, None], (4, 4)), rtol=1e-12)
    with pytest.raises(ValueError, match="one entry for each of the 4 rows"):
        make_free_step(jn.objectives.standard(NET), optimizer, threat=jn.Linf(0.1), step_size=sizes[:3])(state, batch)


def test_the_trace_of_replays(x64):
    """The perturbation goes on to the next batch; the schedule counts replays, the state batches."""
    optimizer = optax.sgd(rate)
    step = jax.jit(make_free_step(jn.objectives.standard(NET), optimizer, threat=jn.Linf(EPSILON), replays=3))
    state = start(optimizer)
    for batch, (kernel, bias, delta, loss) in zip(batches(), trace(3), strict=True):
        state, metrics = step(state, Batch(*map(jnp.asarray, batch)))
        np.testing.assert_allclose(state.params["Dense_0"]["kernel"], kernel, rtol=1e-10)
        np.testing.assert_allclose(state.params["Dense_0"]["bias"], bias, rtol=1e-10)
        np.testing.assert_allclose(state.perturbation, delta, atol=1e-12)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-10)
    assert state.step == 3
    assert optax.tree_utils.tree_get(state.opt_state, "count") == 9
    assert np.abs(state.perturbation).max() > 0.09


def test_one_replay_without_a_ball_is_a_step_of_standard_training(x64):
    optimizer, objective = optax.adam(0.1), jn.objectives.standard(NET)
    batch, state = Batch(*map(jnp.asarray, batches()[0])), start(optimizer)
    free, _ = jax.jit(make_free_step(objective, optimizer, threat=jn.Linf(0.0), replays=1))(state, batch)
    plain, _ = jax.jit(make_step(objective, optimizer))(state, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), free.params, plain.params)
    np.testing.assert_array_equal(free.perturbation, 0)


def test_statistics_move_and_dropout_draws_anew_in_every_replay():
    draws = []

    def objective(params, stats, batch, key):
        jax.debug.callback(lambda data: draws.append(tuple(data.tolist())), jax.random.key_data(key))
        return jnp.sum(params["Dense_0"]["bias"]), (stats + 1, {"loss": jnp.sum(params["Dense_0"]["bias"])})

    optimizer = optax.sgd(0.1)
    step = jax.jit(make_free_step(objective, optimizer, threat=jn.Linf(EPSILON), replays=4))
    state = start(optimizer)._replace(stats=jnp.zeros(()))
    for _ in range(2):
        state, _ = step(state, Batch(jnp.full((4, 5), 0.5), jnp.zeros(4, int)))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert state.stats == 8
    assert len(set(draws)) == 8


def test_all_replays_see_a_batch_augmented_once():
    """The perturbation that one replay leaves is that of the rows of the next, and the next batch is drawn anew."""
    seen = []

    def shifted(key, batch):
        return batch._replace(x=batch.x + jax.random.uniform(key))

    def objective(params, stats, batch, key):
        jax.debug.callback(lambda x: seen.append(np.array(x)), batch.x, ordered=True)
        return jnp.sum(params["Dense_0"]["bias"]), (stats, {"loss": jnp.sum(batch.x)})

    optimizer = optax.sgd(0.1)
    step = make_free_step(objective, optimizer, threat=jn.Linf(0.0, -9, 9), replays=3, augmentations=[shifted, shifted])
    state = start(optimizer)
    for _ in range(2):
        state, _ = jax.jit(step)(state, Batch(jnp.zeros((4, 5)), jnp.zeros(4, int)))
    jax.block_until_ready(state)
    jax.effects_barrier()
    shifts = [rows[0, 0] for rows in seen]
    assert len(shifts) == 6
    assert shifts[0] == shifts[1] == shifts[2] != shifts[3] == shifts[4] == shifts[5]
    assert min(shifts) > 0


def test_both_gradients_come_from_one_pass():
    """A replay's operations are those of the two gradients together, far fewer than of two passes."""
    net = jn.from_linen(jn.models.MLP((200, 200), 3))
    batch, objective = Batch(jnp.full((64, 50), 0.5), jnp.zeros(64, int)), jn.objectives.standard(net)
    params, stats = jax.eval_shape(net.init, KEY, batch.x)
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda params: init_state(KEY, params, stats, optimizer), params)
    state = state._replace(perturbation=jnp.zeros((64, 50)))

    def products(step, state):
        return str(jax.make_jaxpr(step)(state, batch)).count("dot_general")

    free = make_free_step(objective, optimizer, threat=jn.Linf(EPSILON))
    # Forward, kernels, hidden units: 3 + 3 + 2, and one more for the input.
    assert products(make_step(objective, optimizer), state) == 8
    assert products(free, state) == 9


def test_what_is_refused():
    objective, optimizer = jn.objectives.standard(NET), optax.sgd(0.1)
    with pytest.raises(ValueError, match="replays a batch at least once, got replays=0"):
        make_free_step(objective, optimizer, threat=jn.Linf(0.1), replays=0)
    step = make_free_step(objective, optimizer, threat=jn.Linf(0.1))
    batch = Batch(jnp.zeros((4, 5)), jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"batch's shape \(4, 5\), got None: state._replace"):
        step(start(optimizer)._replace(perturbation=None), batch)
    with pytest.raises(ValueError, match=r"batch's shape \(4, 5\), got \(8, 5\)"):
        step(start(optimizer)._replace(perturbation=jnp.zeros((8, 5))), batch)


def test_fit_by_replays_stopped_and_continued(tmp_path):
    """The perturbation is part of the checkpoint."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (32, 5), dtype=np.uint8), random.integers(0, 3, 32).astype(np.int32))
    optimizer, objective = optax.sgd(rate), jn.objectives.standard(NET)
    settings = {"batch_size": 8, "mesh": jn.parallel.data_mesh(jax.devices()[:2])}
    step = make_free_step(objective, optimizer, threat=jn.Linf(EPSILON), replays=3)
    params = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), weights())
    state = init_state(KEY, params, {}, optimizer)._replace(perturbation=jnp.zeros((8, 5)))
    whole = jn.fit.fit(step, state, split, folder=tmp_path / "whole", epochs=3, **settings)
    jn.fit.fit(step, state, split, folder=tmp_path / "twice", epochs=1, **settings)
    again = jn.fit.fit(step, state, split, folder=tmp_path / "twice", epochs=3, **settings)
    jax.tree.map(np.testing.assert_array_equal, again._replace(key=0), whole._replace(key=0))
    assert np.abs(whole.perturbation).max() > 0.09
    assert int(whole.step) == 12
    alone = settings | {"mesh": jn.parallel.data_mesh(jax.devices()[:1])}
    on_one = jn.fit.fit(step, state, split, folder=tmp_path / "alone", epochs=3, **alone)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), on_one.params, whole.params)
