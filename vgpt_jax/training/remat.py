"""What the forward pass of a step keeps for the backward pass, and in how many parts a batch goes through it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vgpt_jax.models.layers import BLOCK
from vgpt_jax.training.sharding import BATCH_AXES, brought_together

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.save_only_these_names(BLOCK),
}
"""What is kept: everything, the results of products with weights, or what the blocks of a network give; the rest is computed
again in the backward pass, which costs up to a third more arithmetic and saves the most of the activations' memory. With the
rest, weights of other devices are sent again."""


def economical(forward: Callable, remat: str, mesh: Mesh | None) -> Callable:
    """``forward(params, ...)`` that brings the parameters together over "fsdp" and keeps what ``remat`` says for its gradient.

    Args:
      forward: a function of parameters, and of what else it is given.
      remat: a key of ``POLICIES``.
      mesh: where the parameters are; None: whole on every device.
    """
    split = mesh is not None and mesh.shape["fsdp"] > 1

    def whole(params: Any, *args: Any) -> Any:
        return forward(brought_together(mesh, params) if split else params, *args)

    if remat == "none":  # not a checkpoint that keeps everything: that also keeps what the compiler would rather not
        return whole
    return jax.checkpoint(whole, policy=POLICIES[remat])


def in_parts(
    function: Callable[[Any, jax.Array], tuple[Any, Any]], batch: Any, key: jax.Array, parts: int, mesh: Mesh | None
) -> tuple[Any, Any]:
    """A batch in parts of equal size, one after the other, for batches that do not fit into memory as a whole.

    Args:
      function: ``(batch, key) -> (means, rows)``: trees of what is averaged over the examples, and of arrays with a row for each.
      batch: a pytree ``[B, ...]``, split over the mesh.
      key: PRNG key. As one part, the function is given this very key; of several each has its own.
      parts: how many; every device has its share of each.
      mesh: devices; None: one.

    Returns:
      The means over all parts, and the rows of all in the order of ``batch``.
    """
    if parts == 1:
        return function(batch, key)

    def divided(x: jax.Array) -> jax.Array:  # [parts, B / parts, ...]; example i is in part i % parts
        x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        if mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        means, rows = function(part[0], jax.random.fold_in(key, part[1]))
        return jax.tree.map(jnp.add, total, means), rows

    pieces = (jax.tree.map(divided, batch), jnp.arange(parts))
    shapes, _ = jax.eval_shape(lambda p: function(jax.tree.map(lambda x: x[0], p), key), pieces[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # A CPU computes the gradients of convolutions slowly inside a loop.
    on_cpu = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform == "cpu"
    total, rows = lax.scan(add, zeros, pieces, unroll=parts if on_cpu else 1)
    together = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    return jax.tree.map(lambda x: x / parts, total), jax.tree.map(together, rows)
