import json

import jax.numpy as jnp
import pytest

from jaxnets.metrics import MetricsLog, Progress, read_metrics


def test_metrics_are_written_a_step_late_and_cut_on_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, keep_until=0) as log:
        assert log.late(1, {"loss": jnp.float32(3)}) == {}
        assert log.late(2, {"loss": jnp.float32(2)}) == {"loss": 3.0}
        log.now(2, {"clean": 0.5})
        log.late(3, {"loss": jnp.float32(1)})
        log.flush()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # as a kill leaves it
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3]
    with MetricsLog(path, keep_until=2):
        pass
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "clean": 0.5},
    ]


@pytest.mark.parametrize(
    "damaged", [b'{"step": 2, "lo', b"5", b'{"loss": 1}', b'{"step": "2"}', b'{"step": 2, "\xff": 1}']
)
def test_a_damaged_line_of_metrics_costs_no_other(tmp_path, caplog, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n' + damaged)
    with MetricsLog(path, keep_until=3):
        pass
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    (warning,) = caplog.messages  # the last line is what a kill leaves
    assert f"{path}, line 2 is damaged" in warning


def test_progress_shows_values_speed_and_time_left(capsys):
    with Progress(first=0, total=40, per_epoch=10, batch_size=8) as progress:
        for step in range(20):
            progress.show({"loss": 1.0 if step < 10 else 3.0})
        progress.show({"clean": 0.75}, evaluated=True)
    line = capsys.readouterr().out
    assert line.startswith("epoch 2.0/4  loss 2.000  clean 0.750")
    assert "ex/s" in line
    assert "s left" in line
