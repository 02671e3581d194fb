"""Every experiment and benchmark runs, small."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import pytest

from benchmarks import loop_overhead

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
LAST_LINE = {
    "cifar10_architectures": "picture: ",
    "cifar10_fast": "mean of",
    "cifar10_trades_awp": "mean of",
    "depth": "picture: ",
    "kurakin_table": "top-1/top-5",
    "mnist_fast": "mean of",
    "mnist_madry": "1 of MadryCNN",
    "mnist_methods": "3 methods",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mnist_fast" else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_smoke(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"experiments.{name}", "--smoke", "--out", str(tmp_path)]
    for _ in range(2):  # the second time reads what the first found
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(LAST_LINE[name])


def test_headers_say_how_they_were_run():
    for name in EXPERIMENTS:
        header = (ROOT / "experiments" / f"{name}.py").read_text().split('"""')[1]
        for word in ("Command", "Hardware", "Published"):
            assert word in header, f"{name} does not state its {word.lower()}"


def test_loop_overhead_measures():
    found = loop_overhead.overhead(
        nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)]), (4, 3, 3, 1), steps=3, rounds=3
    )
    assert min(found) > 0
