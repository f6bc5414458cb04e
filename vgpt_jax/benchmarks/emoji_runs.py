"""Short trainings of a tokenizer on the embedded emoji, for the benchmarks that compare them."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import emoji
from vgpt_jax.data.datasets import load_sources
from vgpt_jax.host_memory import keep_freed_memory
from vgpt_jax.progress import StepProgress
from vgpt_jax.training import tokenizer_stage
from vgpt_jax.training.sharding import make_mesh, shard_batch
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.tokenizer_step import TokenizerState


@dataclass(frozen=True)
class Run:
    """A training while it goes on.

    Attributes: ``step``, steps done; ``state`` after them; ``metrics`` of the last; ``seconds`` of the last, compilation
    included if it was the first of its kind; ``stage``.
    """

    step: int
    state: TokenizerState
    metrics: dict[str, float]
    seconds: float
    stage: Stage


def emoji_config(overrides: Mapping[str, Any]) -> ConfigDict:
    """``configs/emoji.py`` without perceptual and adversarial loss, changed by ``overrides``, fields by their dotted names."""
    config = emoji.get_config()
    config.perceptual.name, config.adversarial.discriminator = "none", "none"
    config.update_from_flattened_dict(dict(overrides))
    return config


def steps_of(
    name: str, config: ConfigDict, start: Callable[[TokenizerState], TokenizerState] = lambda state: state
) -> Iterator[Run]:
    """Trains a config's tokenizer and yields after every step; nothing is written.

    Args:
      name: for the progress.
      config: its ``tokenizer_training.num_steps`` are done.
      start: what is done to the state of step 0.
    """
    keep_freed_memory()
    mesh = make_mesh()
    stage = tokenizer_stage.build(config, mesh, Path(), load_sources(config.data))
    state, reporter = start(stage.state), StepProgress(name, 0, stage.num_steps)
    for step in range(1, stage.num_steps + 1):
        batch = shard_batch(mesh, next(stage.batches))
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(stage.step_after(step - 1)(state, batch, stage.frozen))
        seconds = time.perf_counter() - begun
        reporter.update(step)
        yield Run(step, state, {key: float(value) for key, value in metrics.items()}, seconds, stage)
    reporter.close()


def typical(seconds: list[float]) -> float:
    """The median of the second half of step times, in milliseconds: compilation and the first steps are left out."""
    return 1000 * float(np.median(seconds[len(seconds) // 2 :]))


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = [
        "| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *(row.values() for row in rows))
    ]
    return "\n".join(lines)
