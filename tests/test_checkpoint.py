import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets.checkpoint import CheckpointError, Checkpoints


@pytest.fixture
def state():
    net = jn.from_linen(jn.models.MLP((4,)))
    params, stats = net.init(jax.random.key(0), jnp.zeros((1, 3)))
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    return jn.training.init_state(jax.random.key(1), params, stats, optimizer)


def at(state, step):
    return state._replace(step=jnp.int32(step), params=jax.tree.map(lambda leaf: leaf + step, state.params))


def assert_same(restored, state):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    for left, right in zip(*map(jax.tree.leaves, (restored._replace(key=0), state._replace(key=0))), strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_array_equal(left, right)


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_nothing_to_restore(tmp_path, state):
    assert Checkpoints(tmp_path).restore(state) is None


def test_restores_the_newest_and_keeps_two(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(step, at(state, step))
    assert_same(Checkpoints(tmp_path).restore(state), at(state, 30))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["20", "30"]


def test_a_state_takes_the_place_of_later_ones(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (30, 20):
        checkpoints.save(step, at(state, step))
    assert checkpoints.newest() == Checkpoints(tmp_path).newest() == 20
    assert_same(checkpoints.restore(state), at(state, 20))


@pytest.mark.parametrize("name", ["rate[0.1]", "a\\b"])
def test_folders_that_could_not_be_read_again_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"checkpoints cannot be kept below .*: choose a folder without"):
        Checkpoints(tmp_path / name / "checkpoints")


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda file: file.write_bytes(file.read_bytes()[:20]), lambda f: f.unlink()]
)
def test_damaged_newest_is_told_and_the_one_before_taken(tmp_path, state, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, at(state, 10))
    checkpoints.save(20, at(state, 20))
    damage(largest_file(tmp_path / "20"))
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.restore(state), at(state, 10))
    assert str(tmp_path / "20") in caplog.text
    assert "falling back" in caplog.text
    checkpoints.save(20, at(state, 20))  # the place is free again
    assert_same(Checkpoints(tmp_path).restore(state), at(state, 20))


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path, state):
    Checkpoints(tmp_path).save(10, state)
    flip_a_bit(largest_file(tmp_path / "10"))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read.*10.*delete it to start again"):
        Checkpoints(tmp_path).restore(state)
    assert (tmp_path / "10").exists()


@pytest.mark.parametrize(
    ("change", "there", "here"),
    [
        (lambda leaf: leaf[..., :2], "float32[4]", "float32[2]"),
        (lambda leaf: leaf.astype(jnp.bfloat16), "float32[4]", "bfloat16[4]"),
        (lambda leaf: {"more": leaf}, "float32[4]", "missing"),
    ],
)
def test_a_state_of_another_network_is_told_and_stays(tmp_path, state, caplog, change, there, here):
    """It would else come back in its own size, or pass for damaged."""
    Checkpoints(tmp_path).save(10, state)
    other = state._replace(params=jax.tree.map(change, state.params))
    says = f"10 holds the state of another network or optimizer: params.Dense_0.bias is {there} there and {here} here"
    with pytest.raises(CheckpointError, match=re.escape(says)):
        Checkpoints(tmp_path).restore(other)
    assert "damaged" not in caplog.text
    assert_same(Checkpoints(tmp_path).restore(state), state)


def test_another_structure_is_an_error(tmp_path, state):
    Checkpoints(tmp_path).save(10, state)
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path).restore(state._replace(opt_state=optax.sgd(1.0, momentum=0.9).init(state.params)))


def test_arrays_without_entries_are_kept(tmp_path, state):
    """Some optimizers have them, of which Orbax saves none."""
    state = state._replace(stats={"none": jnp.zeros((0, 3)), "one": jnp.ones(1)})
    Checkpoints(tmp_path).save(1, state)
    restored = Checkpoints(tmp_path).restore(state)
    assert_same(restored, state)
    assert restored.stats["none"].shape == (0, 3)
