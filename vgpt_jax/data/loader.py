"""Batches: Grain for training (seeded, sharded over processes, resumable), a plain pass for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from vgpt_jax.errors import UserError


def training_batches(
    source: Any,
    transform: Callable[[Any, np.random.Generator], dict],
    *,
    batch_size: int,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """Endless batches in an order that depends on the seed alone.

    The examples, shuffled anew each epoch, form one stream; batch number i is its i-th run of ``batch_size``, of which
    each of P processes takes every P-th. So the position is a number, whatever the number of processes.

    Args:
      source: random access, ``len`` and ``[]``.
      transform: ``(source[i], random generator of that draw) -> dict of arrays``.
      batch_size: over all processes.
      seed: of order and transforms.
      process_index, process_count: this process and all; by default those of JAX.

    Returns:
      An iterator over dicts of arrays with this process's part of the batch in front; ``get_state`` and ``set_state``
      read and set its position.

    Raises:
      UserError: the batch cannot be split over the processes.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size % count:
        raise UserError(f"batch_size is {batch_size}, but must be a multiple of the {count} processes")
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(transform)
    batches = stream[index::count].batch(batch_size // count)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def evaluation_batches(
    source: Any, transform: Callable[[Any], dict], *, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a source in order. The last batch is filled up; "mask" ``[B]`` bool says which examples count."""
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, start + batch_size)
        mask = indices < len(source)
        yield stack([transform(source[int(i)]) for i in np.where(mask, indices, 0)]) | {"mask": mask}


def stack(examples: Sequence[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
