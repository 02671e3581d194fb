"""Experiments: one claim a file, with the command, the hardware and what came out in its header."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxnets as jn

# Before JAX computes anything.
jn.cpu.tune()


def recorded(record: Path, run: Callable[[], Any]) -> Any:
    """What ``run`` finds, a value of JSON: read from the record where it is there, else run and written."""
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(run()))
    return json.loads(record.read_text())
