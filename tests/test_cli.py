import json
import os
import subprocess
import sys
import typing

import numpy as np
import pytest
from matplotlib.image import imread

from jaxnets import cli, data
from jaxnets.commands import evaluate, networks, run, train

FAST = ["--model", "mlp", "--epochs", "2", "--steps", "2", "--examples", "40"]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("jaxnets: ")
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(("names", "table"), [
    (cli.DataName, data.NAMES),
    (cli.ModelName, networks.MODELS),
    (cli.ObjectiveName, train.OBJECTIVES),
    (cli.ThreatName, run.THREATS),
    (cli.AttackName, train.ATTACKS),
    (cli.SuiteName, evaluate.SUITES),
    (cli.StartName, train.STARTS),
    (cli.OptimizerName, run.OPTIMIZERS),
    (cli.ScheduleName, run.SCHEDULES),
])  # fmt: skip
def test_every_name_has_a_function_and_every_function_a_name(names, table):
    assert set(typing.get_args(names)) == set(table)


def test_help_shows_every_choice(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert not exit_.value.code
    text = capsys.readouterr().out
    for names in (cli.DataName, cli.ModelName, cli.ObjectiveName, cli.ThreatName, cli.AttackName, cli.OptimizerName):
        for name in typing.get_args(names):
            assert name in text


@pytest.mark.parametrize(("arguments", "said"), [
    (["--data", "letters"], "invalid choice 'letters'"),
    (["--colour", "blue"], "--colour"),
    (["--epsilon", "much"], "could not convert string to float"),
    (["--epsilon", "-0.1"], "--epsilon must be a number from 0 on, got -0.1"),
    (["--epsilon", "nan"], "--epsilon must be a number"),
    (["--epochs", "0"], "--epochs must be a number from 1 on, got 0"),
    (["--steps", "0"], "--steps"),
    (["--learning-rate", "0"], "--learning-rate must be above 0"),
    (["--label-smoothing", "1"], "--label-smoothing"),
    (["--seed", "-1"], "--seed"),
    (["--batch-size", "4000"], "batch_size must be in 1..1437"),
    (["--batch-size", "12"], "batch size 12 does not divide over 8 devices"),
    (["--model", "lenet5"], "LeNet5 takes images of 28x28"),
    (["--optimizer", "sgd", "--learning-rate", "1e30"], "lower the learning rate"),
])  # fmt: skip
def test_impossible_wishes_get_one_line(capsys, tmp_path, arguments, said):
    assert said in refusal(capsys, "train", "--out", str(tmp_path / "run"), *arguments)


def test_other_refusals(capsys, tmp_path):
    assert "train" in refusal(capsys)
    assert "trian" in refusal(capsys, "trian")
    assert "at least one run" in refusal(capsys, "evaluate")
    assert "is no run" in refusal(capsys, "evaluate", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "damaged" in refusal(capsys, "evaluate", str(tmp_path))
    (tmp_path / "config.json").write_text('{"config": {"epochs": 3, "planet": "earth"}}')
    assert "another version" in refusal(capsys, "evaluate", str(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    cli.main(["train", *FAST, "--out", str(folder)])
    return folder


def test_train_writes_the_run(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["config"]["epochs"] == 2
    assert config["config"]["seed"] == 0
    assert "jax" in config["versions"]
    report = json.loads((trained / "report.json").read_text())
    assert set(report) == {"clean", "fgsm", "pgd-40", "pgd-40 margin", "worst case"}
    assert report["worst case"]["rows"] == 40
    assert report["worst case"]["accuracy"] <= report["pgd-40"]["accuracy"] <= report["clean"]["accuracy"]
    for name in ("curves", "robustness", "gallery"):
        assert imread(trained / f"{name}.png").std() > 0.02


def test_another_run_in_the_same_folder_is_refused(trained, capsys):
    error = refusal(capsys, "train", *FAST, "--epsilon", "0.1", "--out", str(trained))
    assert "holds another run (epsilon was 0.2 and is 0.1)" in error


def test_a_second_time_gives_the_same(trained):
    before = {name: (trained / name).read_bytes() for name in ("report.json", "metrics.jsonl", "config.json")}
    cli.main(["train", *FAST, "--out", str(trained)])
    assert before == {name: (trained / name).read_bytes() for name in before}


def test_evaluate_makes_one_table_and_one_picture(trained, tmp_path, capsys):
    other = tmp_path / "other"
    cli.main(["train", *FAST, "--objective", "standard", "--threat", "l2", "--epsilon", "0.5", "--out", str(other)])
    capsys.readouterr()
    out = tmp_path / "both"
    options = ["--steps", "3", "--restarts", "2", "--examples", "30", "--out", str(out)]
    cli.main(["evaluate", str(trained), str(other), *options])
    printed = capsys.readouterr().out
    assert str(trained)[-20:] in printed
    for name in ("clean", "pgd-3x2 ce", "pgd-3x2 margin", "pgd-3x2 dlr", "worst case"):
        assert name in printed
    found = json.loads((out / "evaluation.json").read_text())
    assert set(found) == {str(trained), str(other)}
    assert found[str(other)]["clean"]["rows"] == 30
    assert imread(out / "evaluation.png").std() > 0.02


def test_help_does_not_wait_for_jax():
    code = "import sys, jaxnets.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


def test_autoattack_examples_are_saved_and_verified(trained, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--attack", "autoattack", "--epsilon", "0.02", "--examples", "16", "--save", "--eight-bit"]
    cli.main(["evaluate", str(trained), *options, "--out", str(out)])
    said = capsys.readouterr().out
    for name in ("autoattack: apgd-ce", "autoattack: square", "masked gradients?", "ms a row"):
        assert name in said
    file = trained / "adversarial-autoattack-linf0.02.npz"
    cli.main(["verify", str(file)])
    assert "every accuracy is the one said in the file" in capsys.readouterr().out
    other = tmp_path / "other"
    cli.main(["train", *FAST, "--seed", "1", "--out", str(other)])
    assert "classified otherwise than the file says" in refusal(capsys, "verify", str(file), "--run", str(other))
    with np.load(file) as stored:
        arrays = dict(stored)
    pixels = 255 * arrays["x_adv/autoattack"]
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)
    np.testing.assert_allclose(np.abs(pixels - 255 * arrays["x"]).max(), 5, atol=1e-4)
    arrays["x"] = arrays["x"][::-1]
    np.savez(file, **arrays)
    assert "its clean rows are not the first test rows" in refusal(capsys, "verify", str(file))
    file.write_bytes(file.read_bytes()[:100])
    assert "is damaged" in refusal(capsys, "verify", str(file))
    assert "No such file" in refusal(capsys, "verify", str(tmp_path / "none.npz"))


def test_another_norm_needs_its_epsilon(trained, capsys):
    assert "say --epsilon for l2" in refusal(capsys, "evaluate", str(trained), "--threat", "l2")
    assert "--epsilon must be a number from 0 on" in refusal(capsys, "evaluate", str(trained), "--epsilon", "-1")


def test_a_network_for_ten_classes_refuses_more(capsys):
    assert "drawings of ten digits, got 100 classes: take lenet5_modern" in refusal(
        capsys, "summary", "lenet5", "--classes", "100"
    )


def test_summary_prints_every_layer(capsys):
    cli.main(["summary", "small_cnn", "--image", "28", "28", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "Conv_0", "Conv_1", "Dense_0", "Dense_1", "166,406", "an"]
    assert "an image of 1x1 holds no pooling window" in refusal(capsys, "summary", "vgg16", "--image", "16", "16", "3")
    assert "must be 1 or more" in refusal(capsys, "summary", "mlp", "--image", "0", "16", "3")
