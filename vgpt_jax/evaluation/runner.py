"""Runs an evaluation step over a held-out part: per-example values, a masked sum on the device, one division at the end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vgpt_jax.training.sharding import on_every_host, shard_batch


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found. Attributes: ``scalars`` by name; ``pictures`` by name, uint8 ``[H, W, 3]``."""

    scalars: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def summed(step: Callable[[Any, dict], dict]) -> Callable[[Any, dict], dict]:
    """Compiles an evaluation step into one that sums over the batch.

    Args:
      step: ``(state, batch) -> {name: [B, ...]}``, the values of each example.

    Returns:
      ``(state, batch) -> {name: [...]}``, sums over the examples whose "mask" is set, and their number as "count".
    """

    @jax.jit
    def sums(state: Any, batch: dict) -> dict:
        mask = batch["mask"]
        values = step(state, batch)
        kept = {k: jnp.where(mask.reshape((-1,) + (1,) * (v.ndim - 1)), v, 0) for k, v in values.items()}
        return {k: jnp.sum(v, axis=0) for k, v in kept.items()} | {"count": jnp.sum(mask)}

    return sums


def mean_over(sums: Callable[[Any, dict], dict], state: Any, batches: Iterable[dict], mesh: Mesh) -> dict:
    """The means over all examples of what `summed` adds up batch by batch, by name, float64 NumPy."""
    total = None
    for batch in batches:
        new = sums(state, shard_batch(mesh, batch))
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), on_every_host(new))
        total = new if total is None else {k: total[k] + new[k] for k in total}
    count = total.pop("count")
    return {name: value / count for name, value in total.items()}
