"""The loop with a stage of two numbers: what it logs, when it stops, what it leaves."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vgpt_jax.data.loader import training_batches
from vgpt_jax.errors import UserError
from vgpt_jax.evaluation.runner import Evaluation
from vgpt_jax.training.checkpoint import CheckpointStore
from vgpt_jax.training.loop import train
from vgpt_jax.training.metric_log import MetricLog, curves, read_metrics
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.state import create_replicated_state, skip_counts, skip_if_not_finite

LOGGING = SimpleNamespace(log_every=2, eval_every=4, checkpoint_every=3, keep_checkpoints=2, wandb_project="")


def counting_stage(
    num_steps: int,
    nan_at: tuple[int, ...] = (),
    finished: list | None = None,
    identity: str = "a",
    start=None,
    skips: bool = False,
) -> Stage:
    """Adds up what it is given; its loss is the sum, or NaN at some steps, which it skips or not."""
    mesh = make_mesh()
    _, state = create_replicated_state(lambda rngs: nnx.Linear(1, 1, rngs=rngs), optax.sgd(0.1), 0, mesh)

    def step(state, batch):
        total = jnp.sum(batch["x"])
        loss = jnp.where(jnp.isin(state.step + 1, jnp.array(nan_at, jnp.int32)), jnp.nan, total)
        after = state.replace(step=state.step + 1)
        state = skip_if_not_finite(state, after, loss) if skips else after
        return state, {"loss": loss, "steps": state.step + 0.0} | skip_counts(state)

    source = [{"x": np.float32(i)} for i in range(64)]
    return Stage(
        name="counting",
        state=state,
        start=start or (lambda state: state),
        identity={"data": identity},
        train_steps={0: jax.jit(step, donate_argnums=0)},
        num_steps=num_steps,
        batches=training_batches(source, lambda example, _: example, batch_size=8, seed=0),
        evaluate=lambda state: Evaluation({"step": float(state.step)}, {"picture": np.zeros((4, 4, 3), np.uint8)}),
        finish=lambda state: (finished if finished is not None else []).append(int(state.step)),
    )


def run(directory, stage, logging=LOGGING):
    directory.mkdir(exist_ok=True)
    return train(stage, directory=directory, mesh=make_mesh(), logging=logging, config={}, max_skipped_steps=2)


def test_metrics_are_logged_at_their_steps_and_at_the_end(tmp_path):
    finished = []
    state = run(tmp_path / "run", counting_stage(9, finished=finished))
    found = curves(tmp_path / "run")
    assert [step for step, _ in found["loss"]] == [2, 4, 6, 8, 9]
    assert found["held_out/step"] == [(4, 4.0), (8, 8.0), (9, 9.0)]
    assert found["steps"] == [(s, float(s)) for s in (2, 4, 6, 8, 9)]
    assert int(state.step) == 9
    assert finished == [9]
    assert sorted(p.name for p in (tmp_path / "run" / "pictures").iterdir()) == [
        f"picture_000000{s}.png" for s in (4, 8, 9)
    ]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(tmp_path):
    finished = []
    with pytest.raises(UserError, match="loss not finite at step 8 of 20; the checkpoint of step 6"):
        run(tmp_path / "run", counting_stage(20, nan_at=(8,), finished=finished))
    assert CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).latest_step() == 6
    assert not finished
    assert all(math.isfinite(v) for line in read_metrics(tmp_path / "run") for v in line.values())


def test_a_loss_that_is_not_finite_at_a_checkpoint_step_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="step 6 of 20; the checkpoint of step 3"):
        run(tmp_path / "run", counting_stage(20, nan_at=(6,)))
    assert CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).latest_step() == 3


def test_skipped_steps_are_counted_and_many_in_a_row_stop_the_run(tmp_path):
    state = run(tmp_path / "few", counting_stage(9, nan_at=(2, 5, 6), skips=True))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (9, 3, 0)
    found = curves(tmp_path / "few")
    assert found["skipped"] == [(2, 1.0), (4, 1.0), (6, 3.0), (8, 3.0), (9, 3.0)]
    assert [step for step, _ in found["loss"]] == [4, 8, 9]  # a value that is not finite is no point of a curve
    with pytest.raises(UserError, match=r"loss not finite at step 9 of 20 \(step 7 and all since were skipped\)"):
        run(tmp_path / "many", counting_stage(20, nan_at=(4, 7, 8, 9, 10), skips=True))
    assert CheckpointStore(tmp_path / "many" / "checkpoints", keep=2).latest_step() == 6


def test_the_step_of_a_stage_changes_where_its_table_says(tmp_path):
    stage = counting_stage(6)
    first = stage.train_steps[0]

    def later(state, batch):
        state, metrics = first(state, batch)
        return state, metrics | {"loss": jnp.float32(-1.0)}

    stage = dataclasses.replace(stage, train_steps={0: first, 3: later})
    logging = SimpleNamespace(**vars(LOGGING) | {"log_every": 1})
    run(tmp_path / "run", stage, logging)
    assert [loss == -1.0 for _, loss in curves(tmp_path / "run")["loss"]] == [False] * 3 + [True] * 3


def test_a_resumed_run_goes_on_with_the_data_where_it_was(tmp_path):
    run(tmp_path / "whole", counting_stage(12))
    run(tmp_path / "parts", counting_stage(5))
    run(tmp_path / "parts", counting_stage(12))
    whole, parts = curves(tmp_path / "whole")["loss"], dict(curves(tmp_path / "parts")["loss"])
    assert all(parts[step] == value for step, value in whole)


def test_checkpoints_of_other_data_are_refused(tmp_path):
    run(tmp_path / "run", counting_stage(5))
    with pytest.raises(UserError, match="other data or another tokenizer"):
        run(tmp_path / "run", counting_stage(12, identity="b"))


def test_what_a_stage_starts_from_is_read_at_its_first_step_only(tmp_path):
    started = []

    def start(state):
        started.append(int(state.step))
        return state

    run(tmp_path / "run", counting_stage(5, start=start))
    run(tmp_path / "run", counting_stage(9, start=start))
    assert started == [0]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    lines = [{"step": s, "loss": float(s)} for s in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo')
    log = MetricLog(tmp_path, start_step=4)
    log.write(6, {"loss": 60.0})
    log.close()
    assert read_metrics(tmp_path) == [*lines[:2], {"step": 6, "loss": 60.0}]


def test_weights_and_biases_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"vgpt-jax\[wandb\]"):
        MetricLog(tmp_path, 0, wandb_project="dogs")


def test_weights_and_biases_is_told_project_and_metrics(tmp_path, monkeypatch):
    told = []
    run = SimpleNamespace(
        log=lambda scalars, step: told.append((step, scalars)), finish=lambda: told.append("finished")
    )
    fake = SimpleNamespace(init=lambda **options: told.append((options["project"], options["id"])) or run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    for step in (3, 4):
        log = MetricLog(tmp_path, 0, wandb_project="dogs")
        log.write(step, {"loss": 1.0})
        log.close()
    assert told[1:3] == [(3, {"loss": 1.0}), "finished"]
    assert told[0] == told[3] == ("dogs", (tmp_path / "wandb_id").read_text())  # a resumed run goes on in its curves
