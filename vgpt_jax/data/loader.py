"""Batches: Grain for training (seeded, resumable), a plain pass for evaluation. Of several processes each loads its rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np


class Rows(grain.MapDataset):
    """Of every run of ``batch_size`` elements of a stream some, by their places in it."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._stream, self._batch_size, self._rows = parent, batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, len(self._rows))
        return self._stream[batch * self._batch_size + self._rows[place]]


def training_batches(
    source: Any,
    transform: Callable[[Any, np.random.Generator], dict],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Endless batches in an order that depends on the seed alone.

    The examples, shuffled anew each epoch, form one stream; batch number i is its i-th run of ``batch_size``, of which each
    process loads its rows. So neither the batches nor the position, a number, depend on the number of processes.

    Args:
      source: random access, ``len`` and ``[]``.
      transform: ``(source[i], random generator of that draw) -> dict of arrays``.
      batch_size: over all processes.
      seed: of order and transforms.
      rows: of a batch that this process loads, in order; None: all.

    Returns:
      An iterator over dicts of arrays ``[len(rows), ...]``; ``get_state`` and ``set_state`` read and set its position.
    """
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(transform)
    rows = range(batch_size) if rows is None else rows
    batches = Rows(stream, batch_size, rows).batch(len(rows))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def evaluation_batches(
    source: Any, transform: Callable[[Any], dict], *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a source in order, of each batch the ``rows`` that this process loads (None: all).

    The last batch is filled up; "mask" ``[len(rows)]`` bool says which examples count.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    for start in range(0, len(source), batch_size):
        indices = start + rows
        mask = indices < len(source)
        yield stack([transform(source[int(i)]) for i in np.where(mask, indices, 0)]) | {"mask": mask}


def stack(examples: Sequence[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
