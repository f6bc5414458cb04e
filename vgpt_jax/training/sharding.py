"""Devices: a mesh, replicated state, batches split over the data axis. Models know nothing of it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vgpt_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a copy of every array on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays of this process's part of a batch, split over the data axis."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for name, value in batch.items()}


def split_over(mesh: Mesh, tree: Any) -> Any:
    """Splits every array of a pytree over the data axis, along its first axis."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


def place_on(mesh: Mesh, module: nnx.Module) -> nnx.Module:
    """A module whose arrays are on all devices of the mesh: as they are, sharded or not, where they are there already, and
    otherwise with a copy on each."""
    graph, state = nnx.split(module)
    devices = set(mesh.devices.flat)
    place = lambda x: x if getattr(x, "sharding", None) and x.sharding.device_set == devices else replicate(mesh, x)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(place, state))


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises `UserError` where a batch cannot be split evenly."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{field} is {batch_size}, but must be a multiple of the {mesh.size} devices")
