import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import jaxnets as jn
from jaxnets import cli, data, from_linen, weights
from jaxnets.checkpoint import Checkpoints
from jaxnets.commands import evaluate, networks, objectives, run, settings
from jaxnets.fit import restore_best
from jaxnets.metrics import read_metrics

FAST = ["--model", "mlp", "--epochs", "2", "--steps", "2", "--examples", "40"]
STANDARD = ["--model", "mlp", "--objective", "standard", "--epochs", "2", "--examples", "40"]


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
    (cli.ObjectiveName, objectives.OBJECTIVES),
    (cli.ObjectiveName, settings.TRAITS),
    (cli.ThreatName, run.THREATS),
    (cli.AttackName, objectives.ATTACKS),
    (cli.SuiteName, evaluate.SUITES),
    (cli.CertificateName, evaluate.MARGINS),
    (cli.StartName, objectives.STARTS),
    (cli.AugmentName, objectives.AUGMENTATIONS),
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
    for names in (cli.DataName, cli.ModelName, cli.ObjectiveName, cli.ThreatName, cli.AttackName, cli.OptimizerName,
                  cli.StartName, cli.AugmentName, cli.SweepName):  # fmt: skip
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
    (["--objective", "standard", "--steps", "3"], "--steps changes nothing in standard, only in adversarial, free,"),
    (["--objective", "n_fgsm", "--start", "uniform"], "--start changes nothing in n_fgsm"),
    (["--objective", "kurakin", "--attack", "fgsm"], "--attack changes nothing in kurakin"),
    (["--attack", "fgsm", "--steps", "3"], "--attack fgsm is one step: leave out --steps"),
    (["--learning-rate", "0"], "--learning-rate must be above 0"),
    (["--label-smoothing", "1"], "--label-smoothing"),
    (["--seed", "-1"], "--seed"),
    (["--batch-size", "4000"], "batch_size must be in 1..1437"),
    (["--batch-size", "12"], "batch size 12 does not divide over 8 devices"),
    (["--model", "lenet5"], "LeNet5 takes images of 28x28"),
    (["--optimizer", "sgd", "--learning-rate", "1e30"], "lower the learning rate"),
    (["--ema", "1"], "--ema must be at least 0 and below 1, got 1.0"),
    (["--beta", "6"], "--beta is a weight in grad_align, trades, mart, virtual_adversarial: adversarial has none"),
    (["--objective", "trades", "--beta", "-1"], "--beta must be a number from 0 on"),
    (["--objective", "trades", "--start", "at_clean"], "there the divergence of trades has no gradient"),
    (["--objective", "free", "--awp", "0.01"], "--awp takes the weights of one pass"),
    (["--awp", "-1"], "--awp must be a number from 0 on"),
    (["--steps", "9" * 20], "--steps must be at most 2.14748e+09, got 1e+20"),
    (["--epsilon", "1e39"], "--epsilon must be at most 3.4e+38, got 1e+39"),
    (["--objective", "mart", "--label-smoothing", "0.1"], "no probabilities: leave out --label-smoothing"),
    (["--objective", "crown_ibp", "--augment", "crop", "cutmix"], "leave out --augment cutmix"),
    (["--objective", "auxiliary"], "heads of googlenet and googlenet_bn: small_cnn has none"),
    (["--objective", "ensemble_adversarial"], "--sources are the runs that ensemble_adversarial attacks"),
    (["--sources", "runs/a"], "give both or neither, not adversarial"),
    (["--objective", "ensemble_adversarial", "--sources", "nowhere"], "nowhere is no run"),
    (["--objective", "ibp", "--model", "vit_small"], "no finite bounds through attention"),
    (["--held-out", "2000"], "of 1437 rows from 1 to 1436 can be held out, got 2000"),
    (["--held-out", "-1"], "--held-out must be a number from 0 on"),
    (["--patience", "2"], "say how many rows with --held-out"),
    (["--patience", "0", "--held-out", "9"], "--patience must be a number from 1 on"),
    (["--patience", "2", "--held-out", "9", "--seeds", "2"], "networks that are trained together end together"),
    (["--seeds", "0"], "--seeds must be a number from 1 on"),
    (["--seeds", "2", "--seed", str(2**32 - 1)], "--seed must be from 0 to 4294967295"),
    (["--sweep", "epsilon"], "--sweep says what --values are of"),
    (["--values", "1"], "--sweep says what --values are of"),
    (["--sweep", "beta", "--values", "1"], "adversarial has none"),
    (["--sweep", "epsilon", "--values", "0.1", "-0.1"], "--epsilon must be a number from 0 on, got -0.1"),
    (["--sweep", "epsilon", "--values", "0.1", "0.1"], "--values must differ"),
    (["--sweep", "learning_rate", "--values", "0.1", "0"], "--learning-rate must be above 0"),
    (["--sweep", "learning_rate", "--values", "0.1", "--learning-rate", "0.1"], "--learning-rate is swept"),
    (["--sweep", "epsilon", "--values", "0.1", "--objective", "standard"], "the same network for every epsilon"),
    (["--sweep", "epsilon", "--values", "0.1", "--objective", "auxiliary", "--model", "googlenet"],
     "auxiliary trains the same network for every epsilon"),
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
    for config in ('{"epochs": 3, "planet": "earth"}', '{"optimizer": "foo"}', '{"data_dir": 5}'):
        (tmp_path / "config.json").write_text(f'{{"config": {config}}}')
        assert "another version" in refusal(capsys, "evaluate", str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "damaged" in refusal(capsys, "evaluate", str(tmp_path))
    assert "--seed must be from 0" in refusal(capsys, "evaluate", str(tmp_path), "--seed", "-1")
    suite = ["--attack", "autoattack", "--steps", "7"]
    assert "--steps and --restarts are of pgd" in refusal(capsys, "evaluate", str(tmp_path), *suite)


def test_weights_that_are_no_numbers_in_the_end_are_told(capsys, tmp_path):
    """One step, so that no later loss can tell."""
    options = ["--optimizer", "sgd", "--learning-rate", "3e38", "--weight-decay", "1e30", "--schedule", "constant"]
    options += ["--model", "mlp", "--epochs", "1", "--batch-size", "1432", "--examples", "8"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *options, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "no longer finite after the last step: lower the learning rate" in capsys.readouterr().err
    assert f"the network of {tmp_path} has diverged" in refusal(capsys, "evaluate", str(tmp_path))


def test_a_run_that_never_reached_a_checkpoint_may_be_given_anew(capsys, tmp_path):
    options = ["train", *FAST, "--epochs", "1", "--out", str(tmp_path)]
    assert "does not divide" in refusal(capsys, *options, "--batch-size", "12")
    cli.main(options)
    assert "holds another run (batch_size was 64 and is 128)" in refusal(capsys, *options, "--batch-size", "128")


def test_stopping_says_whether_the_command_goes_on(capsys, monkeypatch):
    def stop(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    for command, said in (("train", "the same command continues"), ("evaluate", "stopped\n")):
        with pytest.raises(SystemExit) as exit_:
            cli.main([command])
        assert exit_.value.code == 130
        assert said in capsys.readouterr().err


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


def test_what_is_refused_changes_nothing(trained, capsys, tmp_path, held_by_another):
    """Neither a folder where another process trains, nor an exported network, nor a training without a name."""
    folder = tmp_path / "folder"
    config, options = folder / "config.json", ["train", *FAST, "--out", str(folder)]
    with held_by_another(folder):
        assert "another process trains in" in refusal(capsys, *options)
    assert not config.exists()
    (folder / "checkpoints" / "4").mkdir(parents=True)
    assert "holds a training without its config.json" in refusal(capsys, *options)
    assert not config.exists()
    shutil.rmtree(folder)
    cli.main(["export", str(trained), str(folder)])
    published = config.read_bytes()
    assert "is damaged or of something else (KeyError('objective')): choose another" in refusal(capsys, *options)
    assert config.read_bytes() == published


def test_another_run_in_the_same_folder_is_refused(trained, capsys):
    error = refusal(capsys, "train", *FAST, "--epsilon", "0.1", "--out", str(trained))
    assert "holds another run (epsilon was 0.2 and is 0.1)" in error


def test_a_second_time_gives_the_same(trained):
    before = {name: (trained / name).read_bytes() for name in ("report.json", "metrics.jsonl", "config.json")}
    cli.main(["train", *FAST, "--out", str(trained)])
    assert before == {name: (trained / name).read_bytes() for name in before}


def test_evaluate_makes_one_table_and_one_picture(trained, tmp_path, capsys):
    other = tmp_path / "other"
    cli.main(["train", *STANDARD, "--threat", "l2", "--epsilon", "0.5", "--out", str(other)])
    capsys.readouterr()
    # One that is no run is told before anything is attacked.
    assert "is no run" in refusal(capsys, "evaluate", str(trained), str(tmp_path))
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


@pytest.mark.parametrize(("threat", "epsilon"), [("linf", "0.004"), ("l2", "0.02")])
def test_evaluate_puts_certificates_below_attacks(threat, epsilon, trained, tmp_path, capsys):
    options = ["--steps", "3", "--restarts", "1", "--examples", "30", "--out", str(tmp_path)]
    options += ["--threat", threat, "--epsilon", epsilon]
    shares = {}
    for name in ("intervals", "crown"):
        cli.main(["evaluate", str(trained), *options, "--certify", name])
        assert f"certified: {name}" in capsys.readouterr().out
        found = json.loads((tmp_path / "evaluation.json").read_text())[str(trained)]
        shares[name] = found[f"certified: {name}"]["accuracy"]
        assert 0 < shares[name] <= found["worst case"]["accuracy"]
    assert shares["intervals"] < shares["crown"]


# Objectives.


def step_and_state(sign=1, **changes):
    """The step of a configuration for a network of ten classes, and its state; no data is read.

    Other networks that it attacks are a linear one, times ``sign``.
    """
    folders = (Path("run"),) if changes.get("objective") == "ensemble_adversarial" else ()
    command = settings.settle(cli.Train(**{"model": "perceptron", "batch_size": 8, "sources": folders, **changes}))
    kernel = jax.random.normal(KEY, (64, 10))
    net = from_linen(networks.module(command.model, 10, (8, 8, 1)))
    sources = [lambda x: sign * x.reshape(len(x), -1) @ kernel] * 9
    step = objectives.step_of(command, net, classes=10, side=8, steps=10, sources=sources)
    state = jn.training.init_state(KEY, *net.init(KEY, BATCH.x), run.optimizer_of(command, 10))
    if command.objective == "free":
        state = state._replace(perturbation=jnp.zeros_like(BATCH.x))
    return step, state if command.ema is None else jn.averaging.init_average(state)


KEY = jax.random.key(0)
BATCH = jn.types.Batch(jnp.full((8, 8, 8, 1), 0.5), jnp.arange(8))


@pytest.mark.parametrize("name", sorted({*typing.get_args(cli.ObjectiveName)} - {"auxiliary"}))
def test_every_objective_makes_a_step_that_keeps_the_state(name):
    mixed = () if settings.TRAITS[name].of_classes else ("mixup", "cutmix")
    options = {"augment": ("crop", "flip", "cutout", *mixed), "ema": 0.9, "awp": None if name == "free" else 0.01}
    step, state = step_and_state(objective=name, **options)
    after, metrics = jax.eval_shape(step, state, BATCH)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert {"loss", "accuracy"} <= metrics.keys()


def test_auxiliary_heads_are_those_of_googlenet():
    command = settings.settle(cli.Train(objective="auxiliary", model="googlenet", batch_size=8))
    net = from_linen(networks.module("googlenet", 10, (32, 32, 3)))
    step = objectives.step_of(command, net, classes=10, side=32, steps=10)
    batch = BATCH._replace(x=jnp.zeros((8, 32, 32, 3)))

    def after_one():
        state = jn.training.init_state(KEY, *net.init(KEY, batch.x), run.optimizer_of(command, 10))
        return step(state, batch)[1]

    assert {"loss", "accuracy"} <= jax.eval_shape(after_one).keys()


def test_options_change_the_step():
    def loss(**changes):
        step, state = step_and_state(**{"objective": "trades", "steps": 2, "model": "mlp", **changes})
        return float(jax.jit(step)(state, BATCH)[1]["loss"])

    assert len({loss(), loss(beta=1.0), loss(awp=0.1), loss(augment=("cutout",)), loss(label_smoothing=0.1)}) == 5


def test_certified_training_raises_epsilon_over_the_first_half():
    step, state = step_and_state(objective="ibp")
    losses = [step(state._replace(step=jnp.asarray(number)), BATCH)[1]["loss"] for number in (0, 3, 5, 9)]
    plain, state = step_and_state(objective="standard")
    np.testing.assert_allclose(losses[0], plain(state, BATCH)[1]["loss"], rtol=1e-6)
    assert losses[0] < losses[1] < losses[2] == losses[3]


def test_a_weight_that_is_averaged_is_the_network():
    _, state = step_and_state(ema=0.9)
    averaged = jax.tree.map(lambda leaf: leaf + 1, (state.params, state.stats))
    net = from_linen(networks.module("perceptron", 10, (8, 8, 1)))
    model = run.model_of(net, state._replace(averaged=averaged))
    np.testing.assert_array_equal(model.args[0]["Dense_0"]["bias"], state.params["Dense_0"]["bias"] + 1)


def test_other_runs_are_attacked_in_ensemble_adversarial_training(trained, tmp_path, capsys):
    options = ["--model", "mlp", "--epochs", "1", "--batch-size", "256", "--examples", "16", "--attack", "fgsm"]
    ensemble = ["train", *options, "--objective", "ensemble_adversarial", "--out", str(tmp_path / "run")]
    cli.main([*ensemble, "--sources", str(trained)])
    assert "ensemble_adversarial against fgsm in Linf" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert saved["sources"] == [str(trained)]
    assert "sources was" in refusal(capsys, *ensemble, "--sources", str(trained), str(tmp_path / "run"))


def test_what_other_runs_give_is_trained_on():
    """A source whose gradients point the other way changes the loss."""

    def loss(sign):
        step, state = step_and_state(sign, model="mlp", objective="ensemble_adversarial", steps=2)
        return float(jax.jit(step)(state, BATCH)[1]["loss"])

    assert loss(1) != loss(-1)


# Best and last, several networks.

# In L2, for signs of gradients near 0 turn with rounding, which differs between one network and two at once.
TOGETHER = [
    "--model", "mlp", "--optimizer", "sgd", "--learning-rate", "0.1", "--epochs", "2", "--steps", "2",
    "--batch-size", "256", "--examples", "16", "--held-out", "100", "--evaluate-every", "1", "--objective", "trades",
    "--threat", "l2", "--epsilon", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "several"
    cli.main(["train", *TOGETHER, "--sweep", "beta", "--values", "6", "--seeds", "2", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    cli.main(["train", *TOGETHER, "--beta", "6", "--seed", "1", "--out", str(folder)])
    return folder


def test_members_are_values_times_seeds():
    command = settings.settle(cli.Train(objective="mart", sweep="beta", values=(1.0, 6.0), seed=3, seeds=2))
    found = {name: (one.beta, one.seed, one.is_several) for name, one in settings.members(command).items()}
    assert found == {
        "beta1-seed3": (1.0, 3, False),
        "beta1-seed4": (1.0, 4, False),
        "beta6-seed3": (6.0, 3, False),
        "beta6-seed4": (6.0, 4, False),
    }
    assert list(settings.members(settings.settle(cli.Train(seeds=2)))) == ["seed0", "seed1"]


NAMES = ["beta6-seed0", "beta6-seed1"]


def test_several_networks_end_as_runs_of_one(several, alone):
    assert sorted(path.name for path in several.glob("[!.]*")) == NAMES
    twin = several / "beta6-seed1"
    configs = [json.loads((folder / "config.json").read_text())["config"] for folder in (twin, alone)]
    assert {name: value for name, value in configs[0].items() if name != "out"} == {
        name: value for name, value in configs[1].items() if name != "out"
    }
    rows, expected = (list(read_metrics(folder / "metrics.jsonl")) for folder in (twin, alone))
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-2, atol=1e-2)
    for last in (False, True):
        found, other = (run.load(folder, examples=16, last=last) for folder in (twin, alone))
        np.testing.assert_allclose(found[1](found[0].x), other[1](other[0].x), atol=1e-2)
    for name in ("report.json", "report-last.json", "curves.png", "robustness.png", "gallery.png"):
        assert (twin / name).exists()
        assert (alone / name).exists()
    with pytest.raises(AssertionError):
        jax.tree.map(
            np.testing.assert_array_equal,
            *(run.load(several / name, examples=16)[1].args[0] for name in NAMES),
        )


def test_means_and_deviations_are_over_seeds(several):
    numbers = json.loads(several.with_name("several.json").read_text())
    assert list(numbers) == ["best", "last"]
    for which, file in (("best", "report.json"), ("last", "report-last.json")):
        (group,) = numbers[which]
        assert list(group["networks"]) == NAMES
        reports = [json.loads((several / name / file).read_text()) for name in NAMES]
        for attack in ("clean", "fgsm", "worst case"):
            found = [report[attack]["accuracy"] for report in reports]
            assert group["mean"][attack] == pytest.approx(np.mean(found))
            assert group["deviation"][attack] == pytest.approx(np.std(found, ddof=1))


@pytest.mark.slow
def test_several_networks_a_second_time(several, capsys):
    files = [*several.glob("*/report*.json"), *several.glob("*/metrics.jsonl"), several.with_name("several.json")]
    before = {file: file.read_bytes() for file in files}
    cli.main(["train", *TOGETHER, "--sweep", "beta", "--values", "6", "--seeds", "2", "--out", str(several)])
    said = capsys.readouterr().out
    assert "accuracy on 16 test rows, l2, best:" in said
    assert [line.split()[0] for line in said.splitlines() if "%" in line][:4] == [*NAMES, "mean", "deviation"]
    assert before == {file: file.read_bytes() for file in files}


def test_folders_of_several_networks_and_of_one_are_told_apart(several, capsys):
    command = ["train", *TOGETHER, "--sweep", "beta", "--values", "6"]
    assert "holds another run (seeds was 2 and is 3)" in refusal(
        capsys, *command, "--seeds", "3", "--out", str(several)
    )
    member = str(several / NAMES[0])
    assert "is the run of one network" in refusal(capsys, *command, "--out", member)
    assert "holds another run (beta was 6.0 and is 5.0)" in refusal(
        capsys, "train", *TOGETHER, "--beta", "5", "--out", member
    )
    assert "is of several networks" in refusal(capsys, "evaluate", str(several / ".together"))


def test_the_best_weights_are_taken_unless_the_last_are_asked_for(alone, tmp_path, capsys):
    folder = shutil.copytree(alone, tmp_path / "alone")
    loaded, before = run.load(folder, examples=16, last=True)
    best, score = restore_best(folder, loaded.state)
    shutil.rmtree(folder / "best")
    wrecked = best._replace(params=jax.tree.map(np.zeros_like, best.params))
    Checkpoints(folder / "best", keep=1).save(int(best.step), (wrecked, score))
    x = loaded.x
    assert not run.load(folder, examples=16)[1](x).any()
    np.testing.assert_array_equal(run.load(folder, examples=16, last=True)[1](x), before(x))
    options = ["--steps", "2", "--restarts", "1", "--examples", "16", "--save", "--out", str(tmp_path)]
    cli.main(["evaluate", str(folder), *options, "--last"])
    found = json.loads((tmp_path / "evaluation.json").read_text())[str(folder)]
    assert found["clean"]["accuracy"] == np.mean(np.argmax(before(x), -1) == loaded.y) > 0.4
    cli.main(["verify", str(folder / "adversarial-pgd-l21-last.npz")])
    assert "every accuracy is the one said in the file" in capsys.readouterr().out


def test_patience_ends_training(tmp_path, capsys):
    options = ["--epochs", "9", "--learning-rate", "1e-9", "--patience", "2"]
    cli.main(["train", *TOGETHER, *options, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "best (step 5)" in said
    assert "last (step 15)" in said


def test_runs_of_a_version_that_asked_less_go_on(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "alone")
    saved = json.loads((folder / "config.json").read_text())
    for name in ("ema", "augment", "seeds", "sweep", "values"):
        del saved["config"][name]
    (folder / "config.json").write_text(json.dumps(saved))
    asked = {name: value for name, value in saved["config"].items() if name != "out"}
    run.claim(folder, settings.settle(cli.Train(**asked)))
    with pytest.raises(ValueError, match=r"ema was None and is 0\.5"):
        run.claim(folder, settings.settle(cli.Train(**asked, ema=0.5)))
    run.load(folder, examples=16)


def test_where_data_is_holds_from_other_folders_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.claim(Path("first"), settings.settle(cli.Train(data_dir=Path("here"))))
    assert json.loads(Path("first/config.json").read_text())["config"]["data_dir"] == str(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    run.claim(Path("second"), settings.settle(cli.Train(data_dir=Path("~/there"))))
    assert json.loads(Path("second/config.json").read_text())["config"]["data_dir"] == str(tmp_path / "there")


def test_help_does_not_wait_for_jax():
    code = "import sys, jaxnets.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


@pytest.mark.parametrize("platform", ["rocm", "abacus"])
def test_a_platform_that_is_not_there_is_told(platform):
    environment = dict(os.environ) | {"JAX_PLATFORMS": platform}
    command = [sys.executable, "-c", "from jaxnets import cli; cli.main()", "summary", "mlp"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f"JAX_PLATFORMS is {platform}, which JAX cannot start here: take cpu, or unset it\n")


def test_programs_are_kept_for_the_next_run(tmp_path):
    environment = dict(os.environ) | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)
    code = "from jaxnets import cli; cli.main()"
    command = [sys.executable, "-c", code, "train", *FAST, "--epochs", "1"]
    kept = []
    for number in (1, 2):
        run = [*command, "--out", str(tmp_path / str(number))]
        subprocess.run(run, check=True, env=environment, stdout=subprocess.DEVNULL)
        kept.append(sorted(path.name for path in (tmp_path / "jaxnets").glob("jit_*-cache")))
    assert kept[0] == kept[1]
    assert kept[0]


def test_queries_of_a_network_that_is_right_nowhere_are_not_told(trained, tmp_path):
    loaded, model = run.load(trained, examples=8)
    wrong = np.argmin(model(loaded.x), axis=1)
    suite = {"square": jn.attacks.cascade({"square": jn.attacks.standard(loaded.threat)["square"]})}
    report = jn.evaluation.evaluate(KEY, model, loaded.x, wrong, suite, threat=loaded.threat)
    json.dumps(evaluate.as_json(report), allow_nan=False)


def test_autoattack_examples_are_saved_and_verified(trained, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--attack", "autoattack", "--epsilon", "0.02", "--examples", "16", "--save", "--eight-bit"]
    cli.main(["evaluate", str(trained), *options, "--out", str(out)])
    said = capsys.readouterr().out
    for name in ("autoattack: apgd-ce", "autoattack: square", "masked gradients?", "ms a row"):
        assert name in said
    file = trained / "adversarial-autoattack-linf0.02-8bit.npz"
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


def test_examples_are_verified_from_another_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained.parent)
    options = ["--steps", "2", "--restarts", "1", "--examples", "8", "--save", "--out", str(tmp_path)]
    cli.main(["evaluate", trained.name, *options])
    monkeypatch.chdir(tmp_path)
    cli.main(["verify", str(trained / "adversarial-pgd-linf0.2.npz")])
    assert "every accuracy is the one said in the file" in capsys.readouterr().out


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
    assert "must be 1 or more" in refusal(capsys, "summary", "mlp", "--classes", "0")


def test_export_writes_the_network_of_a_run(trained, tmp_path, capsys):
    folder = tmp_path / "published"
    cli.main(["export", str(trained), str(folder)])
    files = [folder / "model.safetensors", folder / "config.json"]
    size = sum(file.stat().st_size for file in files)
    said = capsys.readouterr()
    assert said.out == f"written: {folder}/model.safetensors, config.json: 85,002 parameters, {size:,} bytes\n"
    assert said.err == ""
    params, stats, config = weights.load(folder)
    assert (config["model"], config["classes"], config["image"]) == ("mlp", 10, [8, 8, 1])
    assert config["training"]["epochs"] == 2
    assert not {"out", "data_dir"} & set(config["training"])
    loaded, model = run.load(trained, examples=40)
    net = from_linen(networks.module(config["model"], config["classes"], config["image"]))
    np.testing.assert_array_equal(net.infer(params, stats, loaded.x), model(loaded.x))


def test_export_of_a_run_that_was_stopped_says_so(trained, tmp_path, capsys):
    stopped = shutil.copytree(trained, tmp_path / "stopped")
    (stopped / "report.json").unlink()
    cli.main(["export", str(stopped), str(tmp_path / "published")])
    said = f"jaxnets: {stopped} has not ended its training: this is its last checkpoint\n"
    assert capsys.readouterr().err == said
    cli.main(["evaluate", str(stopped), "--steps", "1", "--restarts", "1", "--examples", "8"])
    assert said in capsys.readouterr().err


def test_export_refuses_what_it_cannot_do(trained, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for folder in (other, other / "thesis.txt", trained):
        assert "is there already: choose another folder" in refusal(capsys, "export", str(trained), str(folder))
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]
    assert "File exists" in refusal(capsys, "export", str(trained), str(other / "thesis.txt" / "deeper"))
    assert "is no run" in refusal(capsys, "export", str(other), str(tmp_path / "new"))
    assert "What is written" in refusal(capsys, "export", str(trained))
    config = json.loads((trained / "config.json").read_text())
    config["config"]["model"] = "perceiver"
    (other / "config.json").write_text(json.dumps(config))
    assert "no network is called 'perceiver': take one of perceptron, mlp" in refusal(
        capsys, "export", str(other), str(tmp_path / "new")
    )
    assert not (tmp_path / "new").exists()
