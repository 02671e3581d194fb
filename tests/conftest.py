"""Tests run in processes with eight CPU devices each. Fixtures and settings that the files share."""

# ruff: noqa: E402

import contextlib
import importlib.metadata
import os
import subprocess
import sys

from jaxnets import cpu

# Most of a test's time goes into compiling: leave out the optimisation of machine code, and emit it in the plainer of
# XLA's two ways, of which later versions have one. Its own passes over programs stay.
_QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

# The command keeps what it compiles in the user's home; the tests leave nothing there.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# As the command does, so that no test's program depends on whether another has called it before.
cpu.tune()

import jax

jax.config.update("jax_num_cpu_devices", 8)

import chex
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "jaxnets",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("jaxnets")


@pytest.fixture
def x64():
    """Double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    chex.clear_trace_counter()


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """A process may map so much memory: the programs of all files together are too many."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def eight_devices():
    devices = jax.devices()
    assert len(devices) == 8, "the suite runs on eight CPU devices"
    return devices


@pytest.fixture
def held_by_another():
    """``with held_by_another(folder)``: another process trains there."""
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held'); input()"

    @contextlib.contextmanager
    def holding(folder):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", "-c", hold, str(folder / ".lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            yield
            other.communicate("\n")

    return holding
