"""Data parallelism by sharding: rows over all devices, everything else on each. One device is the special case."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, ``data``, over the given devices or all."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def mesh_or_all(mesh: Mesh | None) -> Mesh:
    """``mesh``, or `data_mesh` of all devices. Raises ValueError for a mesh on which networks cannot be sharded."""
    if mesh is None:
        return data_mesh()
    if "data" not in mesh.axis_names or any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"a mesh must have an axis 'data' and automatic axes alone, got {mesh}: make one by parallel.data_mesh, or "
            "by jax.make_mesh with axis_types=(AxisType.Auto,)"
        )
    return mesh


def by_rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Rows, which lie along ``axis``, are split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets the same number of rows."""
    if batch_size % mesh.size:
        raise ValueError(
            f"batch size {batch_size} does not divide over {mesh.size} devices: take a multiple of {mesh.size}"
        )


def rows_at_once() -> int:
    """How many rows to attack in one batch: 64 on CPUs, whose caches hold no more, 500 elsewhere."""
    return 64 if jax.default_backend() == "cpu" else 500


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of ``tree`` on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))
