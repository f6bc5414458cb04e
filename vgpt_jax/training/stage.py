"""What a stage hands to the loop, and what of it can be compiled without data or devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grain
import jax
from flax import nnx

from vgpt_jax.evaluation.runner import Evaluation
from vgpt_jax.training.state import TrainState

TrainStep = Any
"""``(state, batch, frozen) -> (state, metrics)``, jitted; it donates its state."""


@dataclass(frozen=True)
class Program:
    """What a stage computes, on a mesh that may be of devices that are not here.

    Attributes:
      arguments: of the model's constructor.
      graph: of the model.
      state: of training, as shapes with their shardings.
      frozen: weights that are read and not trained, as shapes with shardings; or None.
      batch: name -> shape with sharding.
      train_steps: as in `Stage`.
      create: makes the state of step 0.
    """

    arguments: dict[str, Any]
    graph: nnx.GraphDef
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    train_steps: Mapping[int, TrainStep]
    create: Callable[[], TrainState]


@dataclass(frozen=True)
class Stage:
    """One thing to train.

    Attributes:
      name: of its folder in the workdir.
      state: of step 0, on the mesh, freshly drawn.
      start: what is done to it before the first step, unless there is a checkpoint (``init_from``).
      identity: what the state depends on besides the config (data, tokenizer); a checkpoint of another is refused.
      train_steps: steps done -> the step from there on, jitted, donating its state: ``(state, batch, frozen) -> (state,
        metrics)``. Metrics are float scalars, "skipped" and "skipped_in_a_row" (`skip_counts`) among them. One key is 0.
      frozen: weights that the step reads, or None.
      batches: endless; has ``get_state`` and ``set_state``; gives this process's rows.
      batch_size: examples of a step, over all devices.
      num_steps: length of the training.
      evaluate: ``state -> Evaluation`` on the held-out part.
      best: a scalar of the evaluation, and whether the "least" or the "greatest" is the best.
      finish: ``state -> None``: writes the trained model.
    """

    name: str
    state: TrainState
    start: Callable[[TrainState], TrainState]
    identity: dict[str, str]
    train_steps: Mapping[int, TrainStep]
    frozen: Any
    batches: grain.DatasetIterator
    batch_size: int
    num_steps: int
    evaluate: Callable[[TrainState], Evaluation]
    best: tuple[str, str]
    finish: Callable[[TrainState], None]

    def step_after(self, steps_done: int) -> TrainStep:
        """The step to take after that many."""
        return self.train_steps[max(first for first in self.train_steps if first <= steps_done)]
