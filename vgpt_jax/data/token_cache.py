"""The token cache: every picture's ids, written once by the frozen tokenizer, so that the generator never sees a pixel.

DIR/metadata.json                    whose ids they are: the tokenizer's fingerprint, the data, the views, sizes, class names
DIR/training-00000-of-00012.npy      token_ids [views, m, N] of the first m pictures, uint16 where the codes are few enough
DIR/training-00000-of-00012.json     their labels, the checksum of the ids and its own; written last, so a shard that has it is
                                     whole
DIR/held_out-00000-of-00001.npy ...  the same for the held-out part, of one view

Shards can be written by several processes, in any order, and after an interruption only what is missing is. They are read where
they lie (memory-mapped), so a cache may be larger than the memory.
"""

import functools
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vgpt_jax.data.sources import identity_of
from vgpt_jax.data.views import CacheViews
from vgpt_jax.errors import UserError
from vgpt_jax.files import written_whole
from vgpt_jax.progress import progress

PARTS = ("training", "held_out")
SHARD_SIZE = 1024
FORMAT = 2


@dataclass(frozen=True)
class TokenSource:
    """Sequences, a source for the loader: example ``i`` is view ``i // M`` of picture ``i % M``.

    Attributes:
      shards: ids ``[views, m, N]`` of ``m`` pictures each, but for the last that may have fewer; in memory or memory-mapped.
      labels: ``[M]`` int32.
      class_names: in the order of the labels.
    """

    shards: tuple[np.ndarray, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def token_ids(self) -> np.ndarray:
        """All ids ``[views, M, N]``, in memory."""
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards, axis=1)

    @functools.cached_property
    def checksums(self) -> tuple[str, ...]:
        """SHA-256 of each shard's ids."""
        return tuple(checksum(ids) for ids in self.shards)

    @property
    def identity(self) -> str:
        """Differs where any id, label or class does."""
        return identity_of(self.class_names, self.checksums, self.labels)

    def counts(self, num_codes: int) -> np.ndarray:
        """How often each code occurs, ``[num_codes]`` int64; a shard at a time."""
        return sum(np.bincount(ids.ravel(), minlength=num_codes) for ids in self.shards)

    def __len__(self) -> int:
        return self.shards[0].shape[0] * len(self.labels)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        view, picture = divmod(int(index), len(self.labels))
        shard, row = divmod(picture, self.shards[0].shape[1])
        return {"token_ids": self.shards[shard][view, row].astype(np.int32), "label": np.int32(self.labels[picture])}


def write_token_cache(
    directory: Path,
    encode: Callable[[np.ndarray], Any],
    sources: tuple[Any, Any],
    views: tuple[CacheViews, CacheViews],
    *,
    batch_size: int,
    num_codes: int,
    token_shape: tuple[int, ...],
    fingerprint: str,
    process_index: int = 0,
    process_count: int = 1,
    shard_size: int = SHARD_SIZE,
    num_threads: int | None = None,
) -> None:
    """Runs the tokenizer over both parts of a data set and writes the shards that are missing, each whole or not at all.

    The ids do not depend on the number of processes, nor on interruptions.

    Args:
      directory: the folder, new or begun before. Processes that write together share it.
      encode: images ``[batch_size, S, S, 3]`` float32 to ids ``[batch_size, *token_shape]``, of NumPy or JAX.
      sources: the training and the held-out one.
      views: `CacheViews` of a training and of a held-out picture.
      batch_size: images given to ``encode`` at once.
      num_codes, token_shape, fingerprint: of the tokenizer.
      process_index, process_count: shard ``i`` is written by process ``i % process_count``.
      shard_size: pictures of a shard.
      num_threads: that decode pictures ahead of ``encode``; None: one for each processor.

    Raises:
      UserError: the folder holds the cache of another tokenizer, of other data or of other views, or cannot be written.
    """
    directory = Path(directory)
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "num_codes": num_codes,
        "token_shape": list(token_shape),
        "class_names": list(sources[0].class_names),
        "shard_size": shard_size,
        "parts": {
            part: {"num_pictures": len(source), "data": source.identity, "num_views": view.num, "views": view.settings}
            for part, source, view in zip(PARTS, sources, views, strict=True)
        },
    }
    try:
        _begin(directory, metadata, write=process_index == 0)
        for part, source, view in zip(PARTS, sources, views, strict=True):
            names = shard_names(part, len(source), shard_size)
            mine = range(process_index, len(names), process_count)
            missing = [i for i in mine if _record_of(directory / names[i], metadata) is None]
            pictures = [range(len(source))[i * shard_size : (i + 1) * shard_size] for i in missing]
            if not missing:
                continue
            with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
                decoded = _decoded(pool, source, view, pictures, batch_size)
                examples = decoded
                if process_index == 0:
                    examples = progress(decoded, f"token cache, {part}", total=sum(map(len, pictures)))
                for i, of_shard in zip(missing, pictures, strict=True):
                    some = itertools.islice(examples, len(of_shard))
                    ids, labels = _encoded(encode, some, view.num, batch_size)
                    _write_shard(directory / names[i], ids.astype(_dtype(num_codes)), labels, metadata)
                next(examples, None)  # ends the progress
    except OSError as error:
        raise UserError(
            f"the token cache in {directory} cannot be written ({error}): what was written before is whole"
        ) from error


def read_token_cache(directory: Path, *, fingerprint: str) -> tuple[TokenSource, TokenSource]:
    """The training and the held-out part of a cache, memory-mapped.

    Args:
      directory: where `write_token_cache` wrote.
      fingerprint: of the tokenizer that the ids must be of.

    Raises:
      UserError: there is none, it is not finished, it is damaged, or it was written by another tokenizer.
    """
    directory = Path(directory)
    metadata = _read_metadata(directory)
    if metadata is None:
        raise UserError(
            f"there is no token cache in {directory}, or its metadata.json cannot be read: delete it to have it written"
        )
    _refuse_other_tokenizer(directory, metadata["fingerprint"], fingerprint)
    counts = {part: -(-metadata["parts"][part]["num_pictures"] // metadata["shard_size"]) for part in PARTS}
    found = {path.stem: _record_of(path.with_suffix(""), metadata) for path in directory.glob("*-of-*.json")}
    whole = {name: record for name, record in found.items() if record is not None}
    named = (_shard_name(part, i, counts[part]) for part in PARTS for i in range(counts[part]))
    missing = next((name for name in named if name not in whole), None)  # damaged metadata may say any number
    if missing:
        raise UserError(
            f"the token cache in {directory} is not finished: {sum(counts.values()) - len(whole)} of {sum(counts.values())} "
            f"shards are missing, the first is {missing}: train the generator again to have them written"
        )
    class_names = tuple(metadata["class_names"])
    parts = []
    for part in PARTS:
        names = shard_names(part, metadata["parts"][part]["num_pictures"], metadata["shard_size"])
        labels = np.array([label for name in names for label in whole[name]["labels"]], np.int32)
        shards = tuple(_load_ids(directory / f"{name}.npy") for name in names)
        source = TokenSource(shards, labels, class_names)
        for name, there in zip(names, source.checksums, strict=True):
            if there != whole[name]["sha256"]:
                raise _damaged(directory / f"{name}.npy", "its checksum is another")
        parts.append(source)
    return parts[0], parts[1]


def _load_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r")
    except Exception as error:  # whatever NumPy raises for a file that is not whole
        raise _damaged(path, error) from error
    if ids.ndim != 3:
        raise _damaged(path, f"it is of shape {ids.shape}")
    return ids


def _damaged(path: Path, why: Any) -> UserError:
    return UserError(f"{path} of the token cache cannot be read ({why}): delete it to have it written again")


def shard_names(part: str, num_pictures: int, shard_size: int) -> list[str]:
    """The shards' files of a part, without their suffix."""
    count = -(-num_pictures // shard_size)
    return [_shard_name(part, i, count) for i in range(count)]


def _shard_name(part: str, number: int, count: int) -> str:
    return f"{part}-{number:05d}-of-{count:05d}"


def checksum(ids: np.ndarray) -> str:
    """SHA-256 of ids, in hexadecimal digits; it differs with their shape and type, too."""
    digest = hashlib.sha256(repr((ids.shape, ids.dtype.str)).encode())
    for view in ids:
        digest.update(np.ascontiguousarray(view))
    return digest.hexdigest()


def _dtype(num_codes: int) -> type:
    return np.uint16 if num_codes <= 1 << 16 else np.int32


def _begin(directory: Path, metadata: dict, *, write: bool) -> None:
    """Holds the metadata of a cache that was begun before against these, or writes them."""
    there = _read_metadata(directory)
    if there is None:
        if (directory / "metadata.json").exists():
            raise UserError(
                f"the token cache in {directory} cannot be read (metadata.json): delete it to have it written again"
            )
        if write:
            with written_whole(directory / "metadata.json") as unfinished:
                unfinished.write_text(json.dumps(metadata, indent=2) + "\n")
        directory.mkdir(parents=True, exist_ok=True)
        return
    _refuse_other_tokenizer(directory, there["fingerprint"], metadata["fingerprint"])
    for part in PARTS:
        for field, what in (
            ("data", "of other pictures"),
            ("views", "of other views (data.cache_views, sizes, crops)"),
        ):
            if there["parts"][part][field] != metadata["parts"][part][field]:
                raise UserError(f"the token cache in {directory} is {what}: delete it to have it written again")
    if there != metadata:
        fields = ", ".join(name for name in metadata if there.get(name) != metadata[name])
        raise UserError(f"the token cache in {directory} differs in {fields}: delete it to have it written again")


def _read_metadata(directory: Path) -> dict | None:
    """The metadata of a cache, None where there are none that can be read."""
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        counts = [metadata["shard_size"], *(metadata["parts"][part]["num_pictures"] for part in PARTS)]
        read = all(type(count) is int and count > 0 for count in counts) and metadata["format"] == FORMAT
        fields = {"fingerprint": str, "num_codes": int, "token_shape": list, "class_names": list}
        read = read and all(isinstance(metadata[name], kind) for name, kind in fields.items())
        return metadata if read and all({"data", "views"} <= metadata["parts"][part].keys() for part in PARTS) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _refuse_other_tokenizer(directory: Path, there: str, here: str) -> None:
    if there != here:
        raise UserError(
            f"the token cache in {directory} was written by tokenizer {there}, but the tokenizer here "
            f"is {here}: delete the cache to have it written again, or bring back its tokenizer"
        )


def _settings_of(metadata: dict) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]


def _record_of(path: Path, metadata: dict) -> dict | None:
    """What is beside the ids of a shard that is whole; None where it is missing, or of a cache that was here before."""
    try:
        record = json.loads(path.with_name(f"{path.name}.json").read_text())
        whole = record["cache"] == _settings_of(metadata) and record.pop("record_sha256") == _record_checksum(record)
        return record if whole and path.with_name(f"{path.name}.npy").is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _record_checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write_shard(path: Path, ids: np.ndarray, labels: list[int], metadata: dict) -> None:
    beside = path.with_name(f"{path.name}.json")
    with written_whole(path.with_name(f"{path.name}.npy")) as unfinished, unfinished.open("wb") as file:
        np.save(file, ids)
    with written_whole(beside) as unfinished:
        record = {"cache": _settings_of(metadata), "sha256": checksum(ids), "labels": labels}
        unfinished.write_text(json.dumps(record | {"record_sha256": _record_checksum(record)}) + "\n")


def _decoded(
    pool: ThreadPoolExecutor, source: Any, views: CacheViews, shards: list[range], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Views and label of the pictures in order, decoded by threads at most two batches ahead."""

    def decode(index: int) -> tuple[np.ndarray, int]:
        example = source[index]
        return views(example, index), int(example["label"])

    ahead = 2 * -(-batch_size // views.num) + 2
    waiting: deque[Future] = deque()
    for index in itertools.chain.from_iterable(shards):
        waiting.append(pool.submit(decode, index))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encoded(
    encode: Callable[[np.ndarray], Any],
    examples: Iterator[tuple[np.ndarray, int]],
    num_views: int,
    batch_size: int,
) -> tuple[np.ndarray, list[int]]:
    """Ids ``[num_views, M, N]`` and labels of pictures. While a batch is encoded the next one is put together."""
    labels: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for views, label in examples:
            labels.append(label)
            yield from views

    flat, running = [], None
    stream = images()
    while batch := list(itertools.islice(stream, batch_size)):
        batch += batch[:1] * (batch_size - len(batch))  # the last one is filled up, for encode to see one size only
        started = encode(np.stack(batch))
        if running is not None:
            flat.append(np.asarray(running))
        running = started
    flat.append(np.asarray(running))
    ids = np.concatenate([x.reshape(len(x), -1) for x in flat])[: len(labels) * num_views]
    return ids.reshape(len(labels), num_views, -1).swapaxes(0, 1), labels
