"""Saved adversarial examples, checked by code that knows no attack."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import jaxnets as jn
from jaxnets.cli import Verify
from jaxnets.commands.verify import _compare, verify
from jaxnets.verification import Examples, InvalidExample, check_examples, load_examples, save_examples


def predict(x):
    return (x.reshape(len(x), -1).mean(axis=1) > 0.5).astype(int)


def examples(epsilon=0.1):
    x = np.linspace(0.2, 0.8, 12, dtype=np.float32).reshape(6, 2)
    y = predict(x)
    x_adv = np.clip(x + np.where(y == 1, -1, 1)[:, None] * np.float32(epsilon), 0, 1)
    survived = {"clean": np.ones(6, bool), "push": predict(x_adv) == y}
    return Examples(x, y, {"push": x_adv}, survived, jn.Linf(epsilon), {"seed": 3})


def test_what_is_written_is_read(tmp_path):
    path, before = tmp_path / "a.npz", examples()
    save_examples(path, before)
    after = load_examples(path)
    assert after.threat == before.threat
    assert after.origin == {"seed": 3}
    np.testing.assert_array_equal(after.x_adv["push"], before.x_adv["push"])
    np.testing.assert_array_equal(after.survived["push"], before.survived["push"])
    survivors = check_examples(after, predict)
    np.testing.assert_array_equal(survivors["push"], before.survived["push"])
    assert 0 < survivors["push"].sum() < 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    "threat",
    [jn.L2(np.inf), jn.L1(2.5, lower=-1.0, top=3), jn.L2(0.5, upper=255.0), jn.L0(2), jn.Masked([True, False])],
)
def test_threats_are_kept(tmp_path, threat):
    save_examples(tmp_path / "a.npz", examples()._replace(threat=threat))
    assert load_examples(tmp_path / "a.npz").threat == threat


def altered(**changes):
    return examples()._replace(**changes)


def nudged(place, value):
    x_adv = examples().x_adv["push"].copy()
    x_adv[place] = value
    return altered(x_adv={"push": x_adv})


@pytest.mark.parametrize(("bad", "said"), [
    (nudged((2, 0), np.nan), "row 2 is not finite"),
    (nudged((5, 1), 1.01), "row 5 leaves the box"),
    (nudged((1, 1), 0.9), "row 1 leaves the ball"),
    (altered(threat=jn.Linf(0.09)), "leaves the ball"),
    (altered(threat=jn.L0(1)), "leaves the ball"),
    (altered(threat=jn.Masked([True, False])), "leaves the ball"),
    (altered(x_adv={"push": np.zeros((5, 2))}), "examples for"),
    (altered(x=examples().x + 1), "attack 'clean'.* leaves the box"),
])  # fmt: skip
def test_bad_examples_are_found(bad, said):
    with pytest.raises(InvalidExample, match=said):
        check_examples(bad, predict)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:200]),
    lambda path: path.write_text("{}"),
    lambda path: np.savez(path, x=np.zeros(3)),
    lambda path: np.savez(path, x=np.array([{}], object), about=np.array("{}")),
])  # fmt: skip
def test_a_damaged_file_is_said_to_be(tmp_path, damage):
    path = tmp_path / "a.npz"
    save_examples(path, examples())
    damage(path)
    with pytest.raises(ValueError, match=r"a\.npz is no file of adversarial examples, or is damaged"):
        load_examples(path)


@pytest.mark.parametrize(("bad", "said"), [
    (altered(origin=None), "origin must be a dict, got None"),
    (altered(threat=jn.Linf(np.nan)), "epsilon must be a number, got nan"),
    (altered(threat=jn.Linf(0.1, upper=None)), "upper must be a number, got None"),
    (altered(x=np.float32(0)), r"x must hold at least one row, got shape \(\)"),
    (altered(x=np.zeros((0, 2))), r"x must hold at least one row, got shape \(0, 2\)"),
    (altered(y=np.zeros(5, int)), r"y does not fit x of shape \(6, 2\): it is int64 of shape \(5,\)"),
    (altered(x_adv={"push": np.zeros((6, 3))}), "x_adv/push does not fit"),
    (altered(survived={"clean": np.ones(6, bool)}), "survived/push is missing"),
    (altered(survived={"push": np.ones(6, bool)}), "survived/clean is missing"),
    (altered(survived={"clean": np.ones(6, bool), "push": np.ones(5, bool)}), "survived/push does not fit"),
    (altered(survived={"clean": np.ones(6, bool), "push": np.ones(6)}), "survived/push .* it is float64"),
    (altered(x_adv={"push": np.ones((6, 2), complex)}), "x_adv/push .* it is complex128"),
    (altered(x=np.full((6, 2), "a")), r"x does not fit x of shape \(6, 2\): it is <U1"),
    (altered(y=np.ones(6)), "y .* it is float64"),
])  # fmt: skip
def test_contents_that_do_not_fit_are_named(tmp_path, bad, said):
    save_examples(tmp_path / "a.npz", bad)
    with pytest.raises(ValueError, match=rf"is damaged \({said}"):
        load_examples(tmp_path / "a.npz")


@pytest.mark.parametrize("origin", [{}, {"run": None}])
def test_a_file_that_names_no_run_asks_for_one(tmp_path, origin):
    save_examples(tmp_path / "a.npz", altered(origin=origin))
    with pytest.raises(ValueError, match=r"a\.npz must name the run that it is of, got None: say --run"):
        verify(Verify(tmp_path / "a.npz"))


def test_a_configuration_that_is_none_is_passed_over(tmp_path):
    save_examples(tmp_path / "a.npz", altered(origin={"run": str(tmp_path), "config": None}))
    with pytest.raises(ValueError, match="is no run"):
        verify(Verify(tmp_path / "a.npz"))


def test_an_infinite_ball_still_has_a_box():
    bad = nudged((0, 0), 1.2)
    free = dataclasses.replace(bad.threat, epsilon=np.inf)
    with pytest.raises(InvalidExample, match="leaves the box"):
        check_examples(bad._replace(threat=free), predict)


def test_no_attack_is_imported():
    code = (
        "import sys, jaxnets.commands.verify; sys.exit(any(name.startswith('jaxnets.attacks') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_file_is_plain(tmp_path):
    save_examples(tmp_path / "a.npz", examples())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert json.loads(str(file["about"]))["threat"] == "Linf"


STAGES = {
    "clean": [1, 1, 1, 1, 1, 0],
    "auto: first": [1, 1, 1, 0, 1, 0],
    "auto: second": [1, 0, 1, 0, 1, 0],
    "auto": [1, 0, 1, 0, 1, 0],
}


def staged(**changes):
    """A file of a cascade, and its survivors found anew."""
    survived = {name: np.array(rows, bool) for name, rows in (STAGES | changes).items() if rows is not None}
    return altered(x_adv={"auto": examples().x}, survived=survived), {
        name: np.array(STAGES[name], bool) for name in ("clean", "auto")
    }


@pytest.mark.parametrize(("changes", "said"), [
    ({"auto: second": [1, 0, 1, 1, 1, 0]}, "'auto: second': rows survive it that had fallen before"),
    ({"auto: first": [1] * 6}, "'auto: first': rows survive it that had fallen before"),
    ({"auto: second": [0] * 6}, "'auto': other rows survive it than its last stage"),
    ({"gone": [1] * 6}, "'gone': the file has no examples of it"),
    ({"auto": [1] * 6}, "'auto': 3 of 6 rows are classified otherwise"),
])  # fmt: skip
def test_stages_of_a_cascade_fit_each_other(changes, said):
    _compare(*staged())
    with pytest.raises(InvalidExample, match=said):
        _compare(*staged(**changes))
