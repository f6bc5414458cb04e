"""Where metrics go: ``metrics.jsonl`` (one line a step that is logged), TensorBoard, and Weights & Biases if asked for.

How fast training was goes to ``speed.jsonl`` and TensorBoard: ``metrics.jsonl`` of equal runs is equal. A run that was killed has
logged more than its newest checkpoint knows of; that is dropped when it goes on, so every step is there once.
"""

import errno
import json
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vgpt_jax.errors import UserError
from vgpt_jax.files import written_whole
from vgpt_jax.training.processes import is_first

JSONL = "metrics.jsonl"
SPEED = "speed.jsonl"
TENSORBOARD = "tensorboard"
HELD_OUT = "held_out/"
FRAME = 16  # bytes around a record of TensorBoard's: its length, and two checksums


class MetricLog:
    """Writes metrics of one stage. Of several processes the first does, and the others write nothing.

    Args:
      directory: of the stage.
      start_step: steps done; what was logged of later steps is dropped.
      wandb_project: "": none.
      config: what Weights & Biases is told of the run.
      evaluation_owed: the evaluation after ``start_step`` is to be done again; what was logged of it is dropped too.

    Raises:
      UserError: Weights & Biases is asked for and not installed.
      OSError: the folder cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        start_step: int,
        wandb_project: str = "",
        config: Mapping | None = None,
        evaluation_owed: bool = False,
    ):
        self._writes = is_first()
        if not self._writes:
            return
        from clu import metric_writers  # imports tensorflow: seconds

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in (JSONL, SPEED):
            drop_lines(directory / name, lambda line: _is_known(line["step"], line, start_step, evaluation_owed))
        for path in sorted((directory / TENSORBOARD).glob("*tfevents*")):
            drop_events(path, start_step, evaluation_owed)
        self._metrics, self._speed = ((directory / name).open("ab", buffering=0) for name in (JSONL, SPEED))
        self._tensorboard = metric_writers.SummaryWriter(str(directory / TENSORBOARD))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")  # pictures take a while to encode
        self._pending: deque[Future] = deque()
        self._wandb = None
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "logging.wandb_project is set, but wandb is not installed: pip install 'vgpt-jax[wandb]'"
                ) from None
            identity = directory / "wandb_id"  # a run that is resumed goes on in the same curves
            if not identity.is_file():
                identity.write_text(secrets.token_hex(4))
            self._wandb = wandb.init(
                project=wandb_project,
                id=identity.read_text(),
                resume="allow",
                name=directory.name,
                dir=str(directory),
                config=dict(config or {}),
            )

    def _to_tensorboard(self, write: Callable, *arguments: Any) -> Future:
        while self._pending and self._pending[0].done():
            _raise_error_of(self._pending.popleft())
        self._pending.append(self._worker.submit(write, *arguments))
        return self._pending[-1]

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step everywhere.

        Raises:
          OSError: this, or what was written before, cannot be written; as all methods.
        """
        if not self._writes:
            return
        _append(self._metrics, {"step": step, **scalars})
        self._to_tensorboard(self._tensorboard.write_scalars, step, dict(scalars))
        if self._wandb:
            self._wandb.log(dict(scalars), step=step)

    def write_pictures(self, step: int, pictures: Mapping) -> None:
        """Writes pictures ``[H, W, 3]`` uint8 by name to TensorBoard."""
        if self._writes and pictures:
            self._to_tensorboard(
                self._tensorboard.write_images, step, {name: picture[None] for name, picture in pictures.items()}
            )

    def write_speed(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes what differs between equal runs."""
        if self._writes and scalars:
            _append(self._speed, {"step": step, **scalars})
            named = {f"speed/{name}": value for name, value in scalars.items()}
            self._to_tensorboard(self._tensorboard.write_scalars, step, named)

    def flush(self) -> Callable[[], Any]:
        """Begins to bring what was written so far to the files; gives a function that waits for that."""
        if not self._writes:
            return lambda: None
        return self._to_tensorboard(self._tensorboard.flush).result

    def close(self) -> None:
        if not self._writes:
            return
        self._metrics.close()
        self._speed.close()
        self._pending.append(self._worker.submit(self._tensorboard.close))
        self._worker.shutdown()
        for written in self._pending:
            _raise_error_of(written)
        if self._wandb:
            self._wandb.finish()


def _raise_error_of(written: Future) -> None:
    error = written.exception()
    if error is not None:
        why = str(error).splitlines()[0].rpartition("; ")[2]  # after TensorFlow's name of the operation, and the path
        raise OSError(f"TensorBoard's files cannot be written: {why}") from error


def _append(file: Any, line: Mapping[str, Any]) -> None:
    encoded = json.dumps(line).encode() + b"\n"
    if file.write(encoded) != len(encoded):
        raise OSError(errno.ENOSPC, "No space left on device", file.name)


def _is_known(step: int, names: Any, start_step: int, evaluation_owed: bool) -> bool:
    """Whether a run that goes on from ``start_step`` has no need to log metrics of these names again."""
    owed = evaluation_owed and step == start_step and any(name.startswith(HELD_OUT) for name in names)
    return step <= start_step and not owed


def drop_lines(path: Path, is_kept: Callable[[dict], bool]) -> None:
    """Drops lines of a file of JSON objects, and whatever follows one that was cut off."""
    there = path.read_bytes() if path.is_file() else b""
    kept = "".join(json.dumps(line) + "\n" for line in _lines(path) if is_kept(line)).encode()
    if kept != there:
        with written_whole(path) as unfinished:
            unfinished.write_bytes(kept)


def drop_events(path: Path, start_step: int, evaluation_owed: bool) -> None:
    """Drops events of later steps from one of TensorBoard's files, and whatever follows one that was cut off."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    def is_kept(event: Event) -> bool:
        pictures = any(value.metadata.plugin_data.plugin_name == "images" for value in event.summary.value)
        names = [HELD_OUT] if pictures else [value.tag for value in event.summary.value]
        return _is_known(event.step, names, start_step, evaluation_owed)

    kept = [record for record in RawEventFileLoader(str(path)).Load() if is_kept(Event.FromString(record))]
    if sum(len(record) + FRAME for record in kept) == path.stat().st_size:
        return
    with written_whole(path) as unfinished, unfinished.open("wb") as file:
        writer = RecordWriter(file)
        for record in kept:
            writer.write(record)


def read_metrics(directory: Path) -> list[dict]:
    """The lines of a stage's ``metrics.jsonl`` as dicts; a line that was cut off, and what follows, is left out."""
    return _lines(Path(directory) / JSONL)


def _lines(path: Path) -> list[dict]:
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            break
        lines.append(found)
    return lines


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> (step, value) pairs, from ``metrics.jsonl``."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(directory):
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, []).append((line["step"], value))
    return found
