import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets.checkpoint import BusyError, Checkpoints, alone_in
from jaxnets.data import Split, batch_indices
from jaxnets.fit import fit, restore_best
from jaxnets.metrics import read_metrics
from jaxnets.training import make_step

OPTIMIZER = optax.sgd(0.05, momentum=0.9)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50).astype(np.int32)
    patterns = rng.integers(0, 128, (3, 4, 4, 1))
    split = Split((patterns[labels] + rng.integers(0, 128, (50, 4, 4, 1))).astype(np.uint8), labels)
    net = jn.from_linen(jn.models.MLP((8,), classes=3))
    params, stats = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    objective = jn.objectives.adversarial(net, partial(jn.attacks.pgd, threat=jn.Linf(0.1), steps=2))
    state = jn.training.init_state(jax.random.key(1), params, stats, OPTIMIZER)
    return objective, state, split


def run(problem, folder, **options):
    objective, state, split = problem
    return fit(
        make_step(objective, OPTIMIZER), state, split, **{"folder": folder, "epochs": 3, "batch_size": 16, **options}
    )


def params_of(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


def test_counts_steps_and_evaluates_after_epochs(problem, tmp_path):
    seen = []
    state = run(
        problem,
        tmp_path,
        epochs=5,
        evaluate=lambda s: {"clean": float(len(seen))} if seen.append(int(s.step)) else {"clean": 0.5},
        evaluate_every=2,
    )
    assert int(state.step) == 15  # 50 // 16 = 3 steps an epoch
    assert seen == [6, 12, 15]
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 16))
    assert [row["step"] for row in rows if "clean" in row] == seen


def test_the_loss_falls(problem, tmp_path):
    run(problem, tmp_path, epochs=60, checkpoint_every=1000)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_the_given_state_is_not_donated(problem, tmp_path):
    run(problem, tmp_path, epochs=1)
    assert np.isfinite(params_of(problem[1])).all()


def test_stopped_and_continued_equals_never_stopped(problem, tmp_path):
    whole = run(problem, tmp_path / "whole", epochs=6, evaluate=lambda state: {"clean": 0.5})

    class StopError(Exception):
        pass

    def stop(state):
        if int(state.step) == 9:
            raise StopError
        return {"clean": 0.5}

    with pytest.raises(StopError):
        run(problem, tmp_path / "stopped", epochs=6, evaluate=stop, checkpoint_every=4)
    continued = run(problem, tmp_path / "stopped", epochs=6, evaluate=lambda state: {"clean": 0.5})
    np.testing.assert_array_equal(params_of(continued), params_of(whole))
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_folder_is_of_one_process_at_a_time(problem, tmp_path, held_by_another):
    says = r"another process trains in .*: wait for it, or choose"
    with held_by_another(tmp_path), pytest.raises(BusyError, match=says):
        run(problem, tmp_path)
    with alone_in(tmp_path):  # this process itself may hold it, as the command does
        run(problem, tmp_path)


def test_raw_keys_are_refused(problem, tmp_path):
    """Which would pass for the keys of a sweep of two."""
    objective, state, split = problem
    raw = objective, state._replace(key=jax.random.PRNGKey(0)), split
    with pytest.raises(ValueError, match=r"keys of jax.random.key, got uint32\[2\]"):
        run(raw, tmp_path)


def test_a_best_of_another_training_is_no_best_of_this(problem, tmp_path):
    """Without checkpoints training begins anew, and with it the search for the best."""
    score = {"evaluate": lambda state: {"clean": 1 / (1 + int(state.step))}, "score": lambda values: values["clean"]}
    run(problem, tmp_path, **score)
    shutil.rmtree(tmp_path / "checkpoints")
    falling = score | {"evaluate": lambda state: {"clean": 0.1 / int(state.step)}}
    run(problem, tmp_path, **falling)
    _, best = restore_best(tmp_path, problem[1])
    np.testing.assert_allclose(best, 0.1 / 3)


def test_a_damaged_newest_checkpoint_costs_only_time(problem, tmp_path, caplog):
    whole = run(problem, tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    newest = tmp_path / "checkpoints" / "9"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again = run(problem, tmp_path)
    assert "falling back to the one before" in caplog.text
    np.testing.assert_array_equal(params_of(again), params_of(whole))
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_eight_devices_agree_with_one(problem, tmp_path, eight_devices):
    one = run(problem, tmp_path / "one", mesh=jn.parallel.data_mesh(eight_devices[:1]))
    eight = run(problem, tmp_path / "eight", mesh=jn.parallel.data_mesh(eight_devices))
    np.testing.assert_allclose(params_of(eight), params_of(one), rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(problem, tmp_path, eight_devices):
    with pytest.raises(ValueError, match="batch size 12 does not divide over 8 devices"):
        run(problem, tmp_path, batch_size=12)
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.50"):
        run(problem, tmp_path, batch_size=64)


def test_a_loss_that_is_not_finite_ends_the_run(problem, tmp_path):
    objective, state, split = problem
    broken = state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: lower the learning rate"):
        run((objective, broken, split), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())  # nothing worth keeping was saved


# Best and last.


class KilledError(Exception):
    pass


def scored(folder, scores=(0.1, 0.5, 0.5, 0.2, 0.7), *, killed_at=None, **options):
    """A sum of what each step has seen, whose n-th epoch is said to score ``scores[n]``."""
    labels = np.arange(6, dtype=np.int32)
    split = Split(np.full((6, 2), 10, np.uint8) * labels.astype(np.uint8)[:, None], labels)

    def step(state, batch):
        total = state.params + (1 + state.step) * jnp.sum(batch.x)
        return state._replace(step=state.step + 1, params=total), {"loss": total}

    def evaluate(state):
        if int(state.step) == killed_at:
            raise KilledError
        return {"robust": scores[int(state.step) // 3 - 1], "sum": float(state.params)}

    mesh = jn.parallel.data_mesh(jax.devices()[:2])
    settings = {"epochs": 5, "batch_size": 2, "evaluate": evaluate, "score": lambda values: values["robust"]}
    return fit(step, START, split, folder=folder, mesh=mesh, **{**settings, **options})


START = jn.training.init_state(jax.random.key(0), jnp.zeros(()), {}, optax.sgd(0.0))


def evaluations(folder):
    return {row["step"]: row["sum"] for row in read_metrics(folder / "metrics.jsonl") if "sum" in row}


def test_the_best_state_is_kept_beside_the_last(tmp_path):
    last = scored(tmp_path, epochs=4)
    best, score = restore_best(tmp_path, START)
    assert (best.step, score) == (6, 0.5)  # the first of two that score the same
    assert best.params == evaluations(tmp_path)[6]
    assert last.step == Checkpoints(tmp_path / "checkpoints").restore(START).step == 12
    scored(tmp_path)
    best, score = restore_best(tmp_path, START)
    assert (best.step, score) == (15, 0.7)


def test_steps_take_the_rows_of_their_numbers(tmp_path):
    scored(tmp_path, epochs=3, score=None)
    key, total = jax.random.fold_in(START.key, 2**32 - 1), 0.0
    for step in range(9):
        total += (1 + step) * 20 * sum(map(int, batch_indices(key, step, 6, 2))) / 255  # two pixels of 10 times the row
    np.testing.assert_allclose(evaluations(tmp_path)[9], total, rtol=1e-5)


def test_without_a_score_there_is_no_best(tmp_path):
    scored(tmp_path, epochs=1, score=None)
    assert restore_best(tmp_path, START) is None
    assert not (tmp_path / "best").exists()


def test_training_ends_without_a_better_score_and_stays_ended(tmp_path):
    last = scored(tmp_path, patience=2)
    assert last.step == 12
    assert restore_best(tmp_path, START)[0].step == 6
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert scored(tmp_path, patience=2, killed_at=12).step == 12  # it is not evaluated again
    assert scored(tmp_path, patience=2, epochs=9).params == last.params
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert scored(tmp_path / "longer", patience=3).step == 15


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_stopped")
    return scored(folder, patience=2), folder


@pytest.mark.parametrize(("step", "place"), [
    (3, "between"), (6, "evaluation"), (6, "before the best"), (6, "between"), (6, "after both"), (12, "evaluation"),
    (12, "between"),
])  # fmt: skip
def test_stopped_anywhere_best_last_and_end_are_those_of_a_run_never_stopped(
    step, place, never_stopped, tmp_path, monkeypatch
):
    save, seen = Checkpoints.save, []

    def dying(self, number, tree):
        here = number == step and not seen
        if here and (self.folder.name, place) in {("best", "before the best"), ("checkpoints", "between")}:
            seen.append(place)
            raise KilledError
        save(self, number, tree)
        if here and (self.folder.name, place) == ("checkpoints", "after both"):
            seen.append(place)
            raise KilledError

    monkeypatch.setattr(Checkpoints, "save", dying)
    with pytest.raises(KilledError):
        scored(tmp_path, patience=2, killed_at=step if place == "evaluation" else None)
    last, folder = never_stopped
    again = scored(tmp_path, patience=2)
    assert (again.step, again.params) == (last.step, last.params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    best, score = restore_best(tmp_path, START)
    assert (best.step, best.params, score) == (6, evaluations(folder)[6], 0.5)


def test_a_best_state_of_a_later_step_stays_until_it_is_passed(tmp_path):
    """Where other devices round otherwise, a run that goes on may score otherwise."""
    scored(tmp_path, epochs=2)
    newest = tmp_path / "checkpoints" / "6"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    scored(tmp_path, (0.1, 0.9, 0.6, 0.55), epochs=4)
    best, score = restore_best(tmp_path, START)
    assert (best.step, score) == (9, 0.6)


def test_impossible_scores_are_refused(tmp_path):
    for options, said in (
        ({"evaluate": None}, "give fit an evaluate too"),
        ({"patience": 0}, "from 1 on, got 0"),
        ({"patience": 1, "score": None}, "without a better score"),
        ({"score": lambda values: float("nan")}, "score must give a number for each network, got nan at step 3"),
        ({"score": lambda values: [1.0, 2.0]}, r"for each network, got \[1. 2.\] at step 3"),
    ):
        with pytest.raises(ValueError, match=said):
            scored(tmp_path, **options)


# A command that is killed.


def start_training(folder):
    code = "from jaxnets.cli import main; main()"
    options = ["--model", "mlp", "--epochs", "12", "--steps", "3", "--evaluate-every", "4", "--examples", "40"]
    command = [sys.executable, "-c", code, "train", *options, "--out", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_checkpoint(folder, process, step):
    deadline = time.monotonic() + 120
    while not any(name.isdigit() and int(name) >= step for name in os.listdir(folder / "checkpoints")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_command_continues_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start_training(whole)
    assert reference.wait(180) == 0
    for step in (22, 66):  # epochs of 22 steps: in the first life and in the second
        process = start_training(killed)
        while not (killed / "checkpoints").exists():
            assert process.poll() is None
            time.sleep(0.01)
        wait_for_checkpoint(killed, process, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "report.json").exists()
    process = start_training(killed)
    assert process.wait(180) == 0
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    digests = [(folder / "checkpoints/264/digest/metadata").read_bytes() for folder in (whole, killed)]
    assert digests[0] == digests[1]
    assert (killed / "report.json").read_bytes() == (whole / "report.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs must be a whole number from 1 on, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number from 1 on, got 1.5"),
        ({"evaluate_every": 0}, "evaluate_every must be"),
        ({"checkpoint_every": -3}, "checkpoint_every must be"),
    ],
)
def test_counts_that_are_none_are_refused(problem, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        run(problem, tmp_path, **options)


def test_images_without_labels_are_refused(problem, tmp_path):
    objective, state, split = problem
    with pytest.raises(ValueError, match="pairs images with labels, got 49 and 50"):
        run((objective, state, Split(split.images[1:], split.labels)), tmp_path)
