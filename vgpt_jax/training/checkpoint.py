"""Checkpoints of a run: the state and the data's position, saved as one thing, asynchronously, by Orbax.

    DIR/STEP/                  written beside its place and renamed, so it is there whole or not at all
    DIR/STEP/manifest.json     the shapes of the state, and size and SHA-256 of every file; a checkpoint counts if these hold
    DIR/damaged-STEP/          one whose files were not what its manifest says, put aside

`AsyncCheckpointer` writes, Orbax's preservation policies say what is kept. Its `CheckpointManager`, which would bring both
together, reads every checkpoint before any can be verified, and asks for preemption in a thread of its own, out of turn with the
other processes.
"""

import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationContext

from vgpt_jax.errors import UserError, listed
from vgpt_jax.training.manifest import damage, shapes_in, shapes_of, write_manifest
from vgpt_jax.training.processes import first_does, is_first, together
from vgpt_jax.training.state import TrainState

UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's, behind the step, until a checkpoint is whole
DELETED = ".deleted"
WRITE_SECONDS = 600
"""After so long a process that waits for the others' parts of a checkpoint gives up."""


class CheckpointStore:
    """The checkpoints in one folder: the newest ``keep``, and of those that were rated the best ``keep_best``.

    With several processes each makes one and all call its methods, in the same order; the first decides.

    Args:
      directory: made if it is not there. What a killed run left unfinished in it is deleted.
      keep: how many are kept for being the newest.
      keep_best: how many for their value (`rate`).
      best: whether the "least" value is the best or the "greatest".

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, directory: Path, keep: int, keep_best: int = 0, best: str = "least"):
        self._directory = Path(directory).absolute()
        first_does(self._make_directory)
        self._values: dict[int, float] = {}
        self._worst_first = lambda value: -value if best == "least" else value
        self._keep = keep
        self._kept = AnyPreservationPolicy(
            [
                LatestN(n=keep),
                BestN(get_metric_fn=self._worst_first, n=keep_best, keep_checkpoints_without_metrics=False),
            ]
        )
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_raised_anyway)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=WRITE_SECONDS, post_finalization_callback=self._write_manifest
            ),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._background: Future | None = None
        self._copy: Callable[[TrainState], TrainState] | None = None
        self._newest: int | None = None  # the step saved last, or restored
        self._whole: int | None = None  # the newest of which that is known
        self._shapes: dict[str, str] = {}  # of the state that is being saved

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in self._directory.glob(f"*{UNFINISHED}*"):
                step = path.name.split(".")[0]
                print(f"checkpoint {step} in {self._directory} was not finished: deleted", file=sys.stderr, flush=True)
                shutil.rmtree(path)
            for path in self._directory.glob(f"*{DELETED}"):
                shutil.rmtree(path)
        except OSError as error:
            raise UserError(
                f"{self._directory} cannot be made or written ({error.strerror}): give a --workdir that can be written"
            ) from error

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._directory.iterdir() if re.fullmatch("[0-9]{1,9}", path.name))

    def latest_step(self) -> int | None:
        """Steps done in the newest checkpoint that is there, verified or not; None where there is none."""
        return max(self._steps(), default=None)

    def whole_step(self) -> int | None:
        """Steps done in the newest checkpoint of which it is known that it is whole: restored, or saved since.

        What is being saved is waited for, without asking the other processes, which may be elsewhere.
        """
        if self._background is not None:
            wait([self._background])
        return self._whole

    def rate(self, step: int, value: float) -> None:
        """Says how good the checkpoint of a step is, or the one to come; a value that is not finite is none."""
        if math.isfinite(value):
            self._values[step] = value

    def prepare(self, state: TrainState) -> None:
        """Compiles what `save` needs for states like this one, which is done at the first `save` otherwise."""
        if not _on_cpu(state):
            return
        shardings = jax.tree.map(lambda x: x.sharding, state)
        copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
        self._copy = copy.lower(state).compile()

    def save(self, state: TrainState, data: dict[str, Any], after: Callable[[], Any] = lambda: None) -> None:
        """Begins to save the state, and beside it JSON values on the data; returns when ``state`` may be donated.

        A checkpoint of this step that is there stays. A save that is under way is waited for.

        Args:
          state: of training.
          data: what the loop needs besides.
          after: called before anything is written, in the background where there is one process.

        Raises:
          UserError: the save before failed, or the folder is gone.
        """
        step = int(state.step)
        if step == self._newest:
            return
        together(self._wait, lambda: self._check_directory(step))
        self._newest = step
        # On CPU the array that Orbax would write is the buffer that the next step overwrites. Elsewhere Orbax copies it to the
        # host before it returns; a second state in an accelerator's memory would be too much.
        on_cpu = _on_cpu(state)
        if on_cpu:
            if self._copy is None:
                self.prepare(state)
            state = self._copy(state)

        def begin() -> None:
            after()
            self._shapes = shapes_of(state)
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
            self._checkpointer.save(self._directory / str(step), args=items)

        # The processes meet in Orbax, and must in the same order in which they meet in the steps of training.
        if on_cpu and jax.process_count() == 1:
            self._background = self._thread.submit(self._attempt, step, begin, self._finish)
        else:
            self._attempt(step, begin)
            self._background = self._thread.submit(self._attempt, step, self._finish)

    def _attempt(self, step: int, *parts: Callable[[], None]) -> None:
        try:
            for part in parts:
                part()
        except Exception as error:  # of the system, Orbax, tensorstore
            for _ in range(3):  # for a moment tensorstore may still be writing
                for path in self._directory.glob(f"{step}{UNFINISHED}*"):
                    shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.1)
            if isinstance(error, jax.errors.JaxRuntimeError):  # no memory is left, or another process is gone
                raise
            raise self._unwritten(step, reason(error)) from error

    def _check_directory(self, step: int) -> None:
        if is_first() and not self._directory.is_dir():  # Orbax would make it again
            raise self._unwritten(step, "the folder is gone")

    def _unwritten(self, step: int, why: str) -> UserError:
        good = f"that of step {self._whole} is whole" if self._whole is not None else "there is none before it"
        return UserError(
            f"the checkpoint of step {step} cannot be written to {self._directory} ({why}), {good}: see that the folder is there "
            "and has room, and run the same command again"
        )

    def _write_manifest(self) -> None:
        """Orbax calls it in the first process, when every file is written and the folder not yet renamed."""
        folder = next(self._directory.glob(f"{self._newest}{UNFINISHED}*"), self._directory / str(self._newest))
        write_manifest(folder, self._shapes)

    def _finish(self) -> None:
        self._checkpointer.wait_until_finished()
        self._whole = self._newest
        if not is_first():
            return
        found = [_Rated(step, datetime.min, self._values.get(step)) for step in self._steps()]
        kept = self._kept.should_preserve(found, context=PreservationContext())
        for checkpoint, keep in zip(found, kept, strict=True):
            if not keep:
                folder = self._directory / str(checkpoint.step)
                shutil.rmtree(folder.rename(folder.with_name(folder.name + DELETED)))

    def _wait(self) -> None:
        background, self._background = self._background, None
        if background is not None:
            background.result()

    def wait(self) -> None:
        """Returns when what is being saved is whole.

        Raises:
          UserError: it cannot be written.
        """
        together(self._wait)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint, with the shardings of ``state``, whatever wrote it, and what was saved on the data.

        Newer ones that are damaged are named on standard error and put aside. So is the first that a run has saved, where it is
        the only one.

        Args:
          state: arrays, or shapes with shardings.

        Returns:
          None if there is no checkpoint to go on from.

        Raises:
          UserError: none of those that are there is whole; or it is of other shapes, or of a later format.
        """
        return self._restore(state, self._steps()[::-1], may_begin_again=True)

    def restore_best(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The same of those that are rated, the best first."""
        self.wait()
        rated = [step for step in self._steps() if step in self._values]
        return self._restore(state, sorted(rated, key=lambda s: (self._worst_first(self._values[s]), s), reverse=True))

    def _restore(
        self, state: TrainState, steps: Sequence[int], may_begin_again: bool = False
    ) -> tuple[TrainState, dict[str, Any]] | None:
        chosen = np.int32(-1)

        def choose() -> None:
            nonlocal chosen
            chosen = np.int32(self._first_whole(steps, shapes_of(state), may_begin_again))

        first_does(choose)
        step = int(multihost_utils.broadcast_one_to_all(chosen))
        if step < 0:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._checkpointer.restore(self._directory / str(step), args=items)
        except Exception as error:  # whole, and of these shapes: out of memory, or the folder went away
            raise UserError(
                f"checkpoint {step} in {self._directory} is whole but cannot be restored ({reason(error)})"
            ) from error
        self._newest = self._whole = step
        return restored.state, restored.data

    def _first_whole(self, steps: Sequence[int], shapes: dict[str, str], may_begin_again: bool) -> int:
        """The first of ``steps`` that is whole, -1 if there are none; those before it are put aside."""
        damaged: dict[int, str] = {}
        for step in steps:
            folder = self._directory / str(step)
            problem = damage(folder)
            if problem is None:
                break
            damaged[step] = problem
        else:
            # One alone, where two would be kept, is the first: little more than nothing is lost.
            if not damaged or (may_begin_again and len(damaged) == 1 < self._keep):
                self._put_aside(damaged, "beginning again")
                return -1
            what = listed([f"{step}: {problem}" for step, problem in damaged.items()])
            raise UserError(
                f"no checkpoint in {self._directory} is whole ({what}): bring back a copy of one, or delete the folder to train "
                "this stage from its first step"
            )
        there = shapes_in(folder)
        other = [name for name in there | shapes if there.get(name) != shapes.get(name)]
        if other:
            name = other[0]
            more = f", and {len(other) - 1} others" if len(other) > 1 else ""
            raise UserError(
                f"checkpoint {step} in {self._directory} is of another state: {name} is {there.get(name, 'missing')} there, "
                f"{shapes.get(name, 'missing')} here{more}: bring back the config that it was trained with"
            )
        self._put_aside(damaged, f"going on from {step}")
        return step

    def _put_aside(self, damaged: dict[int, str], instead: str) -> None:
        for bad, problem in damaged.items():
            folder, number = self._directory / str(bad), 1
            while (aside := folder.with_name(f"damaged-{bad}" + (f"-{number}" if number > 1 else ""))).exists():
                number += 1
            folder.rename(aside)
            print(
                f"checkpoint {bad} in {self._directory} is damaged ({problem}): put aside as {aside.name}; {instead}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Waits for the save that is under way, and lets go of threads.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()


def _on_cpu(state: TrainState) -> bool:
    return all(device.platform == "cpu" for device in state.step.sharding.device_set)


def _raised_anyway(record: logging.LogRecord) -> bool:
    """Keeps Orbax from printing the traceback of an error that it also raises, and that is a line here."""
    never_read = record.name == "asyncio" and "never retrieved" in str(
        record.msg
    )  # Orbax gathers several, and reads one
    return not (record.exc_info and ("orbax" in record.pathname or never_read))


@dataclass(frozen=True)
class _Rated:
    """A checkpoint as Orbax's policies see it; of the time these ask nothing."""

    step: int
    time: datetime
    metrics: float | None


def reason(error: Exception) -> str:
    """What went wrong, in a line: in the system's words where the system refused, also to tensorstore, which has its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error).strip() or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", said)
    return os.strerror(int(code[1])) if code else said.splitlines()[0][:200]
