"""The one training loop. It knows steps, checkpoints, metrics and pictures, and nothing of what is trained."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.progress import StepProgress
from vgpt_jax.training.checkpoint import CheckpointStore
from vgpt_jax.training.metric_log import MetricLog, curves
from vgpt_jax.training.sharding import shard_batch
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.state import TrainState
from vgpt_jax.visualization.grid import save_png
from vgpt_jax.visualization.plots import plot_curves


def train(
    stage: Stage, *, directory: Path, mesh: Mesh, logging: Any, config: Mapping, max_skipped_steps: int
) -> TrainState:
    """Trains a stage to its last step, from its newest checkpoint if there is one, and writes the model.

    The host reads the metrics of the step before while the device works on the next. What is written to
    ``metrics.jsonl`` depends on config and data alone, so a run that was killed and resumed writes the same lines.

    Args:
      stage: what to train.
      directory: of the stage, in the workdir.
      mesh: devices.
      logging: the config's section of that name.
      config: what the metric writers are told of the run.
      max_skipped_steps: how many steps in a row may be skipped for gradients that are not finite.

    Returns:
      The final state.

    Raises:
      UserError: too many steps were skipped (the newest checkpoint is whole), or the checkpoints are of other data.
    """
    from clu import parameter_overview, periodic_actions

    store = CheckpointStore(directory / "checkpoints", logging.keep_checkpoints)
    state, batches = stage.state, stage.batches
    if store.latest_step() is not None:
        state, data = store.restore(state)
        if data["identity"] != stage.identity:
            raise UserError(
                f"the checkpoints in {directory} were trained on other data or another tokenizer ({data['identity']} there, "
                f"{stage.identity} here): bring that back, or delete {directory} to train this stage again"
            )
        batches.set_state(data["position"])
        print(f"{stage.name}: resuming at step {int(state.step)}", flush=True)
    else:
        state = stage.start(state)
        (directory / "parameters.txt").write_text(
            parameter_overview.get_parameter_overview(nnx.to_pure_dict(state.params)) + "\n"
        )
    start = int(state.step)
    log = MetricLog(directory, start, logging.wandb_project, config)
    reporter = StepProgress(stage.name, start, stage.num_steps)
    timing = periodic_actions.ReportProgress(
        num_train_steps=stage.num_steps, every_steps=logging.log_every, writer=log.tensorboard
    )

    def evaluate(step: int, t: float) -> None:
        with timing.timed("evaluation", wait_jax_async_dispatch=False):
            found = stage.evaluate(state)
            log.write(step, {f"held_out/{name}": value for name, value in found.scalars.items()})
            log.write_pictures(step, found.pictures)
            for name, picture in found.pictures.items():
                save_png(picture, directory / "pictures" / f"{name}_{step:07d}.png")
            reporter.report(step, found.scalars, "held out")

    def save(step: int, t: float) -> None:
        with timing.timed("checkpoint", wait_jax_async_dispatch=False):
            store.save(state, {"position": batches.get_state(), "identity": stage.identity})

    last = [stage.num_steps]
    actions = (
        periodic_actions.PeriodicCallback(every_steps=logging.eval_every, on_steps=last, callback_fn=evaluate),
        periodic_actions.PeriodicCallback(every_steps=logging.checkpoint_every, on_steps=last, callback_fn=save),
        timing,
    )

    def settle(step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Reads a step's metrics, stops where too many were skipped, and logs them if it is time."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # one transfer for all
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        in_a_row = int(values.pop("skipped_in_a_row"))
        if in_a_row > max_skipped_steps or (broken and not in_a_row):
            store.close()
            good = store.latest_step()
            kept = f"the checkpoint of step {good} in {directory} is good" if good else "there is no checkpoint yet"
            skipped = f" (step {step - in_a_row + 1} and all since were skipped)" if in_a_row > 1 else ""
            raise UserError(
                f"{stage.name}: {', '.join(broken)} not finite at step {step} of {stage.num_steps}{skipped}; {kept}"
            )
        values = {name: value for name, value in values.items() if name not in broken}
        reporter.update(step)
        if step % logging.log_every == 0 or step == stage.num_steps:
            log.write(step, values)
            reporter.report(step, values)

    before = None
    for step in range(start + 1, stage.num_steps + 1):
        state, metrics = stage.step_after(step - 1)(state, shard_batch(mesh, next(batches)))
        if before is not None:
            settle(*before)
        before = (step, metrics)
        if step % logging.eval_every == 0 or step % logging.checkpoint_every == 0 or step == stage.num_steps:
            settle(*before)  # before anything is evaluated or saved
            before = None
        for action in actions:
            action(step)
    store.close()
    log.close()
    reporter.close()
    _plot(stage.name, directory)
    stage.finish(state)
    return state


def _plot(name: str, directory: Path) -> None:
    """One panel a metric: training beside held-out where both have it."""
    found = curves(directory)
    titles = dict.fromkeys(metric.removeprefix("held_out/") for metric in found)
    panels = {
        f"{name}: {title}": {"training": found.get(title, []), "held out": found.get(f"held_out/{title}", [])}
        for title in titles
    }
    plot_curves(panels, directory / "curves.png")
