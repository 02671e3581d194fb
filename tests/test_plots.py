import numpy as np
import pytest
from matplotlib.image import imread

from jaxnets import plots


def assert_picture(path):
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.02  # not blank


def test_training_curves(tmp_path):
    steps = [{"step": step, "loss": 2.0 / step, "accuracy": 1 - 1 / step} for step in range(1, 41)]
    metrics = [*steps, {"step": 20, "clean": 0.9, "robust": 0.5}, {"step": 40, "clean": 0.95, "robust": 0.6}]
    plots.training_curves(tmp_path / "a.png", metrics, steps_per_epoch=10)
    assert_picture(tmp_path / "a.png")


def test_curves_of_a_single_step(tmp_path):
    plots.training_curves(tmp_path / "a.png", [{"step": 1, "loss": 2.0, "accuracy": 0.0}], steps_per_epoch=1)
    assert_picture(tmp_path / "a.png")


def test_accuracy_against_epsilon(tmp_path):
    curves = {name: (np.linspace(0, 1, 5), np.linspace(1, 0, 5) ** power) for power, name in enumerate("ab", start=1)}
    plots.accuracy_against_epsilon(tmp_path / "a.png", curves, xlabel="epsilon")
    assert_picture(tmp_path / "a.png")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 8])
def test_gallery(tmp_path, channels, count):
    x = np.random.default_rng(0).uniform(size=(count, 8, 8, channels))
    predictions = np.zeros(count, int), np.arange(count) % 2
    plots.gallery(tmp_path / "a.png", x, np.clip(x + 0.1, 0, 1), predictions, ["cat", "dog"])
    assert_picture(tmp_path / "a.png")
