"""What a stage hands to the loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grain
import jax

from vgpt_jax.evaluation.runner import Evaluation
from vgpt_jax.training.state import TrainState

TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, Any]]]


@dataclass(frozen=True)
class Stage:
    """One thing to train.

    Attributes:
      name: of its folder in the workdir.
      state: of step 0, on the mesh, freshly drawn.
      start: what is done to it before the first step, unless there is a checkpoint (``init_from``).
      identity: what the state depends on besides the config (data, tokenizer); a checkpoint of another is refused.
      train_steps: steps done -> the step from there on, ``(state, batch) -> (state, metrics)``, compiled, donating its state;
        metrics are float scalars, "skipped" and "skipped_in_a_row" (`skip_counts`) among them. One key is 0.
      batches: endless; has ``get_state`` and ``set_state``.
      num_steps: length of the training.
      evaluate: ``state -> Evaluation`` on the held-out part.
      finish: ``state -> None``: writes the trained model.
    """

    name: str
    state: TrainState
    start: Callable[[TrainState], TrainState]
    identity: dict[str, str]
    train_steps: Mapping[int, TrainStep]
    batches: grain.DatasetIterator
    num_steps: int
    evaluate: Callable[[TrainState], Evaluation]
    finish: Callable[[TrainState], None]

    def step_after(self, steps_done: int) -> TrainStep:
        """The step to take after that many."""
        return self.train_steps[max(first for first in self.train_steps if first <= steps_done)]
