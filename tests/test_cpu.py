"""The settings for CPUs: made where they are known, and never over the caller's own."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from jaxnets import cpu

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def flags_after(monkeypatch, before, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    monkeypatch.setenv("XLA_FLAGS", before)
    cpu.tune()
    cpu.tune()
    return os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(("before", "after"), [
    ("", f"{FLAG}=individual_dot,reduce"),
    ("--xla_dump_to=x", f"--xla_dump_to=x {FLAG}=individual_dot,reduce"),
    (f"{FLAG}=", f"{FLAG}="),
])  # fmt: skip
def test_flags_are_added_to_those_of_the_caller(before, after, monkeypatch):
    assert flags_after(monkeypatch, before, "0.10.2") == after


@pytest.mark.parametrize("version", ["0.9.1", "0.11.0", "1.0.10."])
def test_versions_that_may_not_know_them_are_left_alone(version, monkeypatch):
    assert flags_after(monkeypatch, "", version) == ""


@pytest.mark.skipif(not importlib.metadata.version("jaxlib").startswith("0.10."), reason="nothing is set there")
def test_convolutions_are_xlas_own_and_sums_are_not():
    """What the flag is for, in the compiled programs."""
    program = """
import jaxnets as jn
jn.cpu.tune()
import jax, jax.numpy as jnp
x, kernel = jnp.ones((8, 16, 16, 8)), jnp.ones((3, 3, 8, 32))
convolve = lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
for f in (convolve, lambda x: jnp.sum(x, axis=(0, 1, 2))):
    print("ynn" in jax.jit(f).lower(x).compile().as_text())
"""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
