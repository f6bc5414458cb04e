"""The one training loop. It knows steps, checkpoints, metrics and pictures, and nothing of what is trained."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vgpt_jax.errors import UserError
from vgpt_jax.evaluation.runner import Evaluation
from vgpt_jax.progress import StepProgress
from vgpt_jax.training.checkpoint import CheckpointStore, reason
from vgpt_jax.training.metric_log import HELD_OUT, MetricLog, curves
from vgpt_jax.training.preemption import GivenUp, given_up_when_told, held_back, stop
from vgpt_jax.training.processes import is_first, say
from vgpt_jax.training.sharding import shard_batch
from vgpt_jax.training.speed import SpeedMeter
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.state import TrainState
from vgpt_jax.training.trace import Trace
from vgpt_jax.visualization.grid import save_png
from vgpt_jax.visualization.plots import plot_curves


def train(
    stage: Stage,
    *,
    directory: Path,
    mesh: Mesh,
    logging: Any,
    config: Mapping,
    max_skipped_steps: int,
    model_from: str = "last",
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains a stage to its last step, from its newest whole checkpoint if there is one, and writes the model.

    The host reads the metrics of the step before while the device works on the next. What is written to
    ``metrics.jsonl`` depends on config and data alone, so a run that was killed and resumed writes the same lines.

    Args:
      stage: what to train.
      directory: of the stage, in the workdir.
      mesh: devices.
      logging: the config's section of that name.
      config: what checkpoints and metric writers are told of the run.
      max_skipped_steps: how many steps in a row may be skipped for gradients that are not finite.
      model_from: what the model is made of, the "last" state or that of the "best" checkpoint.
      profile: after how many steps, from where the run begins, a trace for jax.profiler's viewers is begun, and of how many; it
        goes to ``profile`` in the directory. None: none.

    Returns:
      The state of which the model was made.

    Raises:
      UserError: too many steps were skipped, a batch cannot be read, or the directory cannot be written (the newest checkpoint is
        whole, and named); or the checkpoints are of other data, or all damaged.
      SystemExit: the process was told to stop (`preemption`); the state is saved.
    """
    store = CheckpointStore(directory / "checkpoints", logging.keep_checkpoints, logging.keep_best, best=stage.best[1])
    try:
        state, owed = _first_state(stage, store, directory)
        log = MetricLog(directory, int(state.step), logging.wandb_project, config, evaluation_owed=owed)
        run = _Run(stage, directory, mesh, logging, dict(config), max_skipped_steps, store, log)
        try:
            state = _steps(run, state, owed, Trace(int(state.step), profile, directory / "profile"))
        except BaseException:
            with suppress(OSError):
                log.close()
            raise
        log.close()
        if model_from == "best":
            state = _best_state(stage, store, state)
        store.close()
        if is_first():
            _plot(stage.name, directory)
        stage.finish(state)
    except OSError as error:
        raise UserError(
            f"{stage.name}: {directory} cannot be written ({reason(error)}); {_kept(store, directory)}: see that the folder is "
            "there and has room, and run the same command again"
        ) from error
    return state


@dataclass(frozen=True)
class _Run:
    """What does not change from step to step: the arguments of `train`, and where checkpoints and metrics go."""

    stage: Stage
    directory: Path
    mesh: Mesh
    logging: Any
    config: dict
    max_skipped_steps: int
    store: CheckpointStore
    log: MetricLog


def _first_state(stage: Stage, store: CheckpointStore, directory: Path) -> tuple[TrainState, bool]:
    """The state to go on from, the data set to its place, and whether the evaluation of that step is still to be done."""
    restored = store.restore(stage.state)
    if restored is None:
        from clu import parameter_overview

        state = stage.start(stage.state)
        if is_first():
            params = nnx.to_pure_dict(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params))
            table = parameter_overview.get_parameter_overview(params, include_stats=False)
            (directory / "parameters.txt").write_text(table + "\n")
        return state, False
    state, data = restored
    if data["identity"] != stage.identity:
        raise UserError(
            f"the checkpoints in {directory} were trained on other data or another tokenizer ({data['identity']} there, "
            f"{stage.identity} here): bring that back, or delete {directory} to train this stage again"
        )
    stage.batches.set_state(data["position"])
    say(f"{stage.name}: resuming at step {int(state.step)}")
    return state, data["evaluation_owed"]


def _steps(run: _Run, state: TrainState, owed: bool, trace: Trace) -> TrainState:
    """The steps from ``state`` to the last, evaluated and saved; before them the evaluation that is ``owed``."""
    stage, store, log, directory, logging = run.stage, run.store, run.log, run.directory, run.logging
    start, last = int(state.step), stage.num_steps
    meter = SpeedMeter(stage.batch_size, run.mesh)
    reporter = StepProgress(stage.name, start, last) if is_first() else None

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == last

    def settle(step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Reads a step's metrics, stops where too many were skipped, and logs them if it is time."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # one transfer for all
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        in_a_row = int(values.pop("skipped_in_a_row"))
        if in_a_row > run.max_skipped_steps or (broken and not in_a_row):
            skipped = f" (step {step - in_a_row + 1} and all since were skipped)" if in_a_row > 1 else ""
            raise UserError(
                f"{stage.name}: {', '.join(broken)} not finite at step {step} of {last}{skipped}; {_kept(store, directory)}"
            )
        values = {name: value for name, value in values.items() if name not in broken}
        speed = meter.read(step) if due(step, logging.log_every) else None
        if speed is not None:
            log.write(step, values)
            log.write_speed(step, speed)
        if reporter is not None:
            reporter.update(step)
            if speed is not None:
                reporter.report(step, values | speed)

    def evaluate() -> Evaluation:
        with meter.left_out():
            try:
                return stage.evaluate(state)
            except OSError as error:
                raise UserError(f"{stage.name}: the held-out part cannot be read ({error})") from error

    def record(step: int, found: Evaluation) -> None:
        log.write_pictures(step, found.pictures)
        log.write(step, {f"{HELD_OUT}{name}": value for name, value in found.scalars.items()})
        # Of the checkpoints that an undisturbed run would have, not of one that SIGTERM left: the best must be the same.
        if due(step, logging.checkpoint_every):
            store.rate(step, found.scalars[stage.best[0]])
        if reporter is not None:
            for name, picture in found.pictures.items():
                save_png(picture, directory / "pictures" / f"{name}_{step:07d}.png")
            reporter.report(step, found.scalars, "held out")

    for step, value in curves(directory).get(f"{HELD_OUT}{stage.best[0]}", []):
        if due(step, logging.checkpoint_every):
            store.rate(step, value)
    if owed:
        record(start, evaluate())
    store.prepare(state)
    program_after = _programs(stage, meter)
    inputs = _inputs(run, start, meter)
    first = list(islice(inputs, 1))
    for step, batch in first:
        program_after(step - 1, state, batch)  # while SIGTERM ends the process at once; there is nothing to save
    meter.read(start)
    trace.after(start, state)
    before = None
    with held_back() as is_time_to_stop:
        for step, batch in chain(first, inputs):
            state, metrics = program_after(step - 1, state, batch)(state, batch, stage.frozen)
            if before is not None:
                settle(*before)
            before = (step, metrics)
            trace.after(step, metrics)
            told, owed = is_time_to_stop(), due(step, logging.eval_every)
            if told or owed or due(step, logging.checkpoint_every):
                settle(*before)  # before anything is evaluated or saved
                before = None
            if owed and not told:
                try:
                    with given_up_when_told():
                        found = evaluate()
                    record(step, found)
                    owed = False
                except GivenUp:
                    told = True
            if told or due(step, logging.checkpoint_every):
                data = {"position": stage.batches.get_state(), "identity": stage.identity, "config": run.config}
                store.save(state, data | {"evaluation_owed": owed}, after=log.flush())
            if told:
                store.wait()
                stop(f"{stage.name} is saved at step {step} of {last}")
        store.wait()
    trace.end()
    if reporter is not None:
        reporter.close()
    return state


def _kept(store: CheckpointStore, directory: Path) -> str:
    good = store.whole_step()
    return f"the checkpoint of step {good} in {directory} is good" if good is not None else "there is no checkpoint yet"


def _programs(stage: Stage, meter: SpeedMeter) -> Callable[[int, TrainState, dict], jax.stages.Compiled]:
    """``(steps done, state, batch)`` -> the compiled step to take; each is compiled when its turn comes."""
    compiled: dict[Any, jax.stages.Compiled] = {}

    def program_after(steps_done: int, state: TrainState, batch: dict) -> jax.stages.Compiled:
        step = stage.step_after(steps_done)
        if step not in compiled:
            begun = time.perf_counter()
            with meter.left_out():
                compiled[step] = step.lower(state, batch, stage.frozen).compile()
            meter.compiled(compiled[step], time.perf_counter() - begun)
        return compiled[step]

    return program_after


def _inputs(run: _Run, start: int, meter: SpeedMeter) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """The steps to take, each with its batch."""
    stage = run.stage
    for step in range(start + 1, stage.num_steps + 1):
        try:
            with meter.waiting_for_input():
                batch = next(stage.batches)
        except Exception as error:  # whatever a source, a decoder or a transform raises
            raise UserError(
                f"{stage.name}: the batch of step {step} cannot be read ({type(error).__name__}: {error}); "
                f"{_kept(run.store, run.directory)}: mend the data, and run the same command again"
            ) from error
        yield step, shard_batch(run.mesh, batch)


def _best_state(stage: Stage, store: CheckpointStore, state: TrainState) -> TrainState:
    """The state of the best checkpoint; ``state`` where no evaluation had a value to compare."""
    restored = store.restore_best(state)
    if restored is None:
        say(f"{stage.name}: {stage.best[0]} was never finite; the model is of the last step")
        return state
    say(f"{stage.name}: the model is of step {int(restored[0].step)}, with the {stage.best[1]} {stage.best[0]}")
    return restored[0]


def _plot(name: str, directory: Path) -> None:
    """One panel a metric: training beside held-out where both have it."""
    found = curves(directory)
    titles = dict.fromkeys(metric.removeprefix(HELD_OUT) for metric in found)
    panels = {
        f"{name}: {title}": {"training": found.get(title, []), "held out": found.get(f"{HELD_OUT}{title}", [])}
        for title in titles
    }
    plot_curves(panels, directory / "curves.png")
