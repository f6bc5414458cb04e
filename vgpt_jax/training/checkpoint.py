"""Checkpoints of a run: the state and the data's position, saved as one thing, asynchronously, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vgpt_jax.errors import UserError
from vgpt_jax.training.state import TrainState


class CheckpointStore:
    """The checkpoints in one folder, the newest ``keep`` of them.

    Args:
      directory: made if it is not there.
      keep: how many are kept.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, directory: Path, keep: int):
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{directory} cannot be made ({error.strerror}): give a --workdir that can be written"
            ) from error
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def latest_step(self) -> int | None:
        """Steps done in the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to save the state, and beside it JSON values on the data; returns when ``state`` may be donated.

        A checkpoint of this step that is there stays.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        # A copy of its own: on CPU the array that Orbax would write is the buffer that the next step overwrites.
        held = jax.tree.map(lambda x: np.array(x) if x.is_fully_addressable else x, state)
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(held), data=ocp.args.JsonSave(data))
        )

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, with the shapes and shardings of ``state``, and what was saved on the data.

        Raises:
          UserError: it does not fit ``state`` or cannot be read.
        """
        step = self.latest_step()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
            )
        except Exception as error:  # Orbax and tensorstore raise what they like for a file that is not whole
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            others = [str(s) for s in sorted(self._manager.all_steps()) if s != step]
            instead = f"delete {step} to go on from {others[-1]}" if others else "delete it to begin again"
            directory = self._manager.directory
            raise UserError(f"checkpoint {step} in {directory} cannot be restored ({reason}): {instead}") from error
        return restored.state, restored.data

    def close(self) -> None:
        """Waits for saves that are under way."""
        self._manager.wait_until_finished()
        self._manager.close()
