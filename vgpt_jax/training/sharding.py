"""Where arrays are: the mesh of devices, the rules by which a state is split over it, batches, and results on every host.

The mesh has three axes. Over "data" the batch is split and the state repeated; over "fsdp" both are split, and each weight is
brought together only where a step needs it (ZeRO, arXiv 1910.02054); over "tensor" the weights of a layer are split and the batch
repeated (Megatron-LM, arXiv 1909.08053). Models know nothing of it: ``RULES`` go by the names of their parameters, which those
of the optimizer's moments and of the averages end in, too.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vgpt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES = (
    # Codebooks are small, and codebook surgery addresses them code by code.
    (r"(^|/)(quantizer|buffers)/", ()),
    # What the layer before split comes back together in the next: row-parallel, then the sum over "tensor".
    (r"(^|/)(out|conv2)/kernel", ("tensor", "fsdp")),
    (r"(^|/)kernel", ("fsdp", "tensor")),
    (r"(^|/)(token_embedding|position_embedding|target_embedding|head)($|/)", ("tensor", "fsdp")),
)
"""Patterns of names -> the axes over which the last two dimensions are split, if their sizes allow it. The first that fits
counts; what none fits (biases, scales, counters) is repeated on every device."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of ``data * fsdp * tensor`` devices, one of which may be -1: as many as are left over.

    Neighbours along "tensor" are the nearest devices. Of several TPU slices each takes its share of "data", so that what goes
    between slices is the gradients alone.

    Args:
      data, fsdp, tensor: the sizes of the axes.
      devices: all of all processes, if None.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or "data" cannot be split over the slices.
    """
    devices = jax.devices() if devices is None else list(np.asarray(devices).flat)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh is {shown}: each must be at least 1, and one of them may be -1, for what is left over")
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh is {shown}, but there are {len(devices)} devices, which these do not multiply to")
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    if shape[0] % slices:
        raise UserError(f"mesh.data is {shape[0]}, but must be a multiple of the {slices} slices")
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=types)


def describe(mesh: Mesh) -> str:
    """The mesh in words: "8 TPU v5 lite devices, data 4, fsdp 2, 2 processes"."""
    device = mesh.devices.flat[0].device_kind
    parts = [f"{mesh.size} {device} device{'s' if mesh.size > 1 else ''}"]
    if mesh.shape["data"] != mesh.size:
        parts += [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    if jax.process_count() > 1:
        parts.append(f"{jax.process_count()} processes")
    return ", ".join(parts)


def num_shards(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_batches(mesh: Mesh) -> NamedSharding:
    """Split along the first dimension, over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def of_state(mesh: Mesh, tree: Any) -> Any:
    """The shardings of a state, or of any part of one, by ``RULES``: a tree of the same structure.

    Args:
      mesh: with the axes ``AXES``.
      tree: arrays or shapes.
    """
    return jax.tree.map_with_path(lambda path, x: NamedSharding(mesh, spec(mesh, path, x.shape)), tree)


def spec(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> PartitionSpec:
    """How an array of that path and shape is split."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
    if len(shape) < 2 or not axes:
        return PartitionSpec()
    fits = (mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape[-2:], strict=True))
    wanted = [axis if fit else None for axis, fit in zip(axes, fits, strict=True)]
    return PartitionSpec(*[None] * (len(shape) - 2), *wanted) if any(wanted) else PartitionSpec()


def brought_together(mesh: Mesh, params: Any) -> Any:
    """Parameters for a step's use: whole along "fsdp". Their gradients come back split as they are.

    `remat.economical` has them brought together again for the backward pass instead of kept.
    """
    return jax.tree.map_with_path(lambda path, x: _together(mesh, spec(mesh, path, x.shape), x), params)


def _together(mesh: Mesh, split: PartitionSpec, x: jax.Array) -> jax.Array:
    if "fsdp" not in split:
        return x
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
    placed = lambda x, where: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, where))  # noqa: E731
    together = jax.custom_vjp(lambda x: placed(x, whole))
    together.defvjp(lambda x: (placed(x, whole), None), lambda _, gradient: (placed(gradient, split),))
    return together(x)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a copy of every array, which every process has, on every device."""
    return put(tree, replicated(mesh))


def put(tree: Any, shardings: Any) -> Any:
    """Puts arrays where ``shardings``, one or a tree of them, say; each process must have them, or its part of them."""
    if jax.process_count() > 1:
        tree = jax.tree.map(lambda x: np.asarray(x) if getattr(x, "is_fully_addressable", True) else x, tree)
    return jax.device_put(tree, shardings)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that devices of this process hold, in order: those that it has to load."""
    slices = {
        index[0].indices(batch_size)[:2]
        for index in of_batches(mesh).addressable_devices_indices_map((batch_size,)).values()
    }
    return np.concatenate([np.arange(*rows) for rows in sorted(slices)])


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows (`local_rows`) of a batch."""
    shards = num_shards(mesh)
    held = local_rows(mesh, shards).tolist()

    def place(local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        size = len(local) // len(held)  # rows of a shard

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size * shards)
            first = held.index(start // size) * size
            return local[first : first + stop - start]

        return jax.make_array_from_callback((size * shards, *local.shape[1:]), of_batches(mesh), rows)

    return {name: place(value) for name, value in batch.items()}


def split_over(mesh: Mesh, tree: Any) -> Any:
    """Splits every array of a pytree, which every process has, along its first axis as batches are."""
    return put(tree, of_batches(mesh))


def on_every_host(tree: Any) -> Any:
    """Arrays, wherever their parts are, as NumPy arrays in every process."""

    def whole(x: Any) -> np.ndarray:
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True) if spread else x)

    return jax.tree.map(whole, tree)


def place_on(mesh: Mesh, module: nnx.Module) -> nnx.Module:
    """A module whose arrays are on all devices of the mesh: as they are, sharded or not, where they are there already, and
    otherwise with a copy on each."""
    graph, state = nnx.split(module)
    devices = set(mesh.devices.flat)
    place: Callable = lambda x: (  # noqa: E731
        x if getattr(x, "sharding", None) and x.sharding.device_set == devices else replicate(mesh, x)
    )
    return nnx.merge(graph, jax.tree.map(place, state))


def bytes_of(tree: Any) -> int:
    """What a device holds of a tree of arrays, or of shapes with shardings, without what layouts pad."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_memory(name: str, state: Any) -> None:
    """Raises `UserError` where a device has less memory than its part of a state of training takes.

    Args:
      name: of the stage.
      state: as shapes with their shardings.
    """
    needed = bytes_of(state)
    there = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    there = there or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{name}: its weights and what the optimizer keeps take {needed / 1e9:,.0f} GB a device, which has "
            f"{there / 1e9:,.0f}: make the model smaller, or share it among more devices (mesh.fsdp, mesh.tensor)"
        )


def check_batch_size(mesh: Mesh, batch_size: int, field: str, parts: int = 1) -> None:
    """Raises `UserError` where a batch, in so many parts, cannot be split evenly."""
    shards = num_shards(mesh)
    if batch_size < 1 or batch_size % (shards * parts):
        of_parts = f" times {field.split('.')[0]}.accumulate, {parts}" if parts > 1 else ""
        raise UserError(
            f"{field} is {batch_size}, but must be a multiple of the {shards} devices that share it (mesh.data * mesh.fsdp)"
            f"{of_parts}"
        )
