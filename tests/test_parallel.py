"""Meshes: which are made, which are taken."""

import jax
import pytest
from jax.sharding import AxisType

from jaxnets import parallel


def test_batches_that_do_not_divide_raise(eight_devices):
    mesh = parallel.data_mesh(eight_devices)
    with pytest.raises(ValueError, match="batch size 12 does not divide over 8 devices: take a multiple of 8"):
        parallel.check_divisible(12, mesh)
    parallel.check_divisible(16, mesh)


def test_all_devices_unless_others_are_given(eight_devices):
    assert parallel.data_mesh().size == 8
    assert parallel.mesh_or_all(None) == parallel.data_mesh() == parallel.data_mesh(eight_devices)
    some = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    assert parallel.mesh_or_all(some) is some


@pytest.mark.parametrize(("name", "kind"), [("data", AxisType.Explicit), ("rows", AxisType.Auto)])
def test_meshes_that_no_network_is_sharded_on_are_refused(eight_devices, name, kind):
    """Explicit axes, which `jax.make_mesh` makes unless told, fail in convolutions and dropout."""
    mesh = jax.make_mesh((8,), (name,), axis_types=(kind,))
    with pytest.raises(ValueError, match=r"an axis 'data' and automatic axes alone, got .*: make one by parallel"):
        parallel.mesh_or_all(mesh)
