"""The clock of the benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes until what it gives is there."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began
