"""The settings for CPUs: made where they are known, and never over the caller's own."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


@pytest.mark.parametrize("version", ["0.9.1", "0.11.0", "0.12.0.1", "1.0.10."])
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


# Convolutions by oneDNN.


def test_onednn_is_taken_where_it_is_known_to_work():
    known = importlib.metadata.version("jaxlib") in cpu._KNOWN
    assert cpu._registered == (known and (platform.system(), platform.machine()) == ("Linux", "x86_64"))


where_known = pytest.mark.skipif(not cpu._registered, reason="not known to work here")
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def lowered(*arrays, strides=(1, 1), padding="SAME", **settings):
    """A convolution, lowered anew."""
    settings = {"dimension_numbers": CHANNELS_LAST} | settings
    return jax.jit(lambda x, kernel: lax.conv_general_dilated(x, kernel, strides, padding, **settings)).lower(*arrays)


def is_by_onednn(program):
    return "__onednn$convolution" in program.as_text()


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


small = st.integers(1, 4)
pairs = st.tuples(small, small)
edges = st.tuples(st.integers(0, 6), st.integers(0, 6))


@where_known
@given(
    small, pairs, pairs, pairs, pairs, st.tuples(edges, edges), st.integers(1, 3), pairs,
    st.sampled_from(["HWIO", "HWOI", "OIHW", "IHWO"]),
)  # fmt: skip
def test_onednn_computes_what_xla_does(rows, image, window, strides, dilation, padding, groups, channels, order):
    image = tuple(3 * size for size in image)
    assume(all(a + sum(p) > (w - 1) * d for a, p, w, d in zip(image, padding, window, dilation, strict=True)))
    sizes = dict(zip("HWIO", (*window, channels[0], groups * channels[1]), strict=True))
    arrays = normal(rows, *image, groups * channels[0]), normal(*(sizes[axis] for axis in order), seed=1)
    settings = {
        "strides": strides, "padding": padding, "rhs_dilation": dilation, "feature_group_count": groups,
        "dimension_numbers": ("NHWC", order, "NHWC"),
    }  # fmt: skip
    by_xla = lowered(*arrays, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        by_onednn = lowered(*arrays, **settings)
    assert (is_by_onednn(by_xla), is_by_onednn(by_onednn)) == (False, True)
    expected, got = (program.compile()(*arrays) for program in (by_xla, by_onednn))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@where_known
def test_volumes_are_convolved_by_onednn_too(one_device):
    arrays = normal(2, 5, 6, 7, 3), normal(2, 3, 2, 3, 4, seed=1)
    numbers, settings = ("NDHWC", "DHWIO", "NDHWC"), {"strides": (1, 2, 1), "padding": ((1, 0), (1, 1), (0, 0))}
    program = lowered(*arrays, dimension_numbers=numbers, **settings)
    assert is_by_onednn(program)
    got = program.compile()(*arrays)
    padded = np.pad(arrays[0], ((0, 0), *settings["padding"], (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 3, 2), (1, 2, 3))[:, :, ::2]
    np.testing.assert_allclose(got, np.einsum("bxyzcdhw,dhwco->bxyzo", windows, arrays[1]), rtol=1e-5, atol=1e-5)


X, KERNEL = normal(8, 6, 6, 4), normal(3, 3, 4, 8, seed=1)
LEFT_TO_XLA = {
    "input with holes": lambda: lowered(X, KERNEL, padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
    "groups of rows": lambda: lowered(X, KERNEL, batch_group_count=2),
    "channels first": lambda: lowered(X.transpose(0, 3, 1, 2), KERNEL, dimension_numbers=("NCHW", "HWIO", "NCHW")),
    "padding taken away": lambda: lowered(X, KERNEL, padding=((-1, 1), (0, 0))),
    "no rows": lambda: lowered(X[:0], KERNEL),
    "half precision": lambda: lowered(X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)),
    "half precision, summed in single": lambda: lowered(
        X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ),
    "signals": lambda: lowered(X[0], KERNEL[0], strides=(1,), dimension_numbers=("NWC", "WIO", "NWC")),
}


@where_known
@pytest.mark.parametrize("name", LEFT_TO_XLA)
def test_what_onednn_cannot_do_or_is_slow_at_is_left_to_xla(name, one_device):
    assert is_by_onednn(lowered(X, KERNEL))
    assert not is_by_onednn(LEFT_TO_XLA[name]())


@where_known
def test_double_precision_is_left_to_xla(one_device, x64):
    assert not is_by_onednn(lowered(X.astype(np.float64), KERNEL.astype(np.float64)))


@where_known
def test_several_devices_convolve_by_xla(one_device, eight_devices):
    """Even where the process says that it has one: programs for several are cut up by XLA."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    assert not is_by_onednn(lowered(jax.device_put(X, NamedSharding(mesh, PartitionSpec("batch"))), KERNEL))


@where_known
def test_exported_programs_convolve_by_xla(one_device):
    """For machines that may not have oneDNN."""
    convolve = jax.jit(lambda x: lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST))
    assert is_by_onednn(convolve.lower(X))
    assert "onednn" not in jax.export.export(convolve)(X).mlir_module()


@where_known
def test_programs_that_are_kept_on_disk_convolve_by_xla(one_device, tmp_path):
    """XLA cannot write those with oneDNN."""
    wanted = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": str(tmp_path)}
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        assert not is_by_onednn(lowered(X, KERNEL))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
