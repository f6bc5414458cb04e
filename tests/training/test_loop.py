"""The loop with a stage of two numbers: what it logs, when it stops, what it leaves, and that a disturbed run ends as another."""

import dataclasses
import json
import math
import os
import shutil
import signal
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
from vgpt_jax.training import loop, manifest, preemption
from vgpt_jax.training.checkpoint import CheckpointStore
from vgpt_jax.training.loop import train
from vgpt_jax.training.metric_log import curves, read_metrics
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.stage import Stage
from vgpt_jax.training.state import compiled_step, create_sharded_state, skip_counts, skip_if_not_finite

LOGGING = SimpleNamespace(
    log_every=2, eval_every=4, checkpoint_every=3, keep_checkpoints=2, keep_best=1, wandb_project=""
)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Drawing the curves takes longer than the steps."""
    monkeypatch.setattr(loop, "plot_curves", lambda panels, path: path.write_bytes(b""))


class Broken:
    """A source whose examples cannot all be read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        raise ValueError("not a JPEG")


def counting_stage(
    num_steps: int,
    nan_at: tuple[int, ...] = (),
    finished: list | None = None,
    identity: str = "a",
    start=None,
    skips: bool = False,
    source=None,
) -> Stage:
    """Adds up what it is given; its loss is the sum, or NaN at some steps, which it skips or not. Step 6 is its best."""
    mesh = make_mesh()
    _, state = create_sharded_state(lambda rngs: nnx.Linear(1, 1, rngs=rngs), optax.sgd(0.1), 0, mesh)

    def step(state, batch, frozen):
        total = jnp.sum(batch["x"])
        loss = jnp.where(jnp.isin(state.step + 1, jnp.array(nan_at, jnp.int32)), jnp.nan, total)
        params = jax.tree.map(lambda x: 0.9 * x + 0.01 * total, state.params)
        after = state.replace(step=state.step + 1, params=params)
        state = skip_if_not_finite(state, after, loss) if skips else after
        return state, {"loss": loss, "steps": state.step + 0.0} | skip_counts(state)

    source = source or [{"x": np.float32(i)} for i in range(64)]
    return Stage(
        name="counting",
        state=state,
        start=start or (lambda state: state),
        identity={"data": identity},
        train_steps={0: compiled_step(step, state, mesh)},
        frozen=None,
        num_steps=num_steps,
        batches=training_batches(source, lambda example, _: example, batch_size=8, seed=0),
        batch_size=8,
        evaluate=lambda state: Evaluation(
            {"step": float(state.step), "distance": abs(float(state.step) - 6)},
            {"picture": np.zeros((4, 4, 3), np.uint8)},
        ),
        best=("distance", "least"),
        finish=lambda state: (finished if finished is not None else []).append(int(state.step)),
    )


def run(directory, stage, logging=LOGGING, **options):
    directory.mkdir(exist_ok=True)
    options = {"mesh": make_mesh(), "logging": logging, "config": {}, "max_skipped_steps": 2} | options
    return train(stage, directory=directory, **options)


def tell_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption._Process.told.wait(60)


class ToldAt:
    """Batches; this process is told to stop when the ``step``-th of them is taken."""

    def __init__(self, batches, step: int):
        self._batches, self._left = batches, step
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self._left -= 1
        if self._left == 0:
            tell_this_process()
        return next(self._batches)


def stopped(directory, stage, **options) -> None:
    """Runs a stage that is told to stop on the way."""
    with pytest.raises(SystemExit) as end, preemption.listening():
        run(directory, stage, **options)
    assert end.value.code == preemption.EXIT_STATUS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder and final state of a run of 12 steps. Not to be written to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    state = run(directory, counting_stage(12))
    assert (directory / "curves.png").is_file()
    return directory, state


def assert_ends_as(undisturbed, directory, state=None) -> None:
    """Goes on with a disturbed run to its end, which is that of the undisturbed."""
    expected, final = undisturbed
    state = run(directory, counting_stage(12)) if state is None else state
    jax.tree.map(np.testing.assert_array_equal, state, final)
    assert (directory / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    assert sorted(p.name for p in (directory / "pictures").iterdir()) == sorted(
        p.name for p in (expected / "pictures").iterdir()
    )


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


def test_speed_goes_to_a_file_of_its_own(undisturbed):
    directory, _ = undisturbed
    lines = [json.loads(line) for line in (directory / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert {"step_ms", "examples_per_s", "input_wait", "resident_peak_gb", "compile_s"} < set(lines[0])
    assert all(line["examples_per_s"] == pytest.approx(8000 / line["step_ms"]) for line in lines)
    assert not {"step_ms", "compile_s"} & {name for line in read_metrics(directory) for name in line}


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

    def later(state, batch, frozen):
        state, metrics = first(state, batch, frozen)
        return state, metrics | {"loss": jnp.float32(-1.0)}

    later = compiled_step(later, stage.state, make_mesh())
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


def test_a_checkpoint_knows_the_config(tmp_path):
    run(tmp_path / "run", counting_stage(3), config={"seed": 7})
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    assert store.restore(counting_stage(3).state)[1]["config"] == {"seed": 7}


@pytest.mark.parametrize("step", [2, 4, 5, 6, 12])  # 4: an evaluation is due; 6: a checkpoint; 12: both, and the end
def test_a_run_that_is_told_to_stop_saves_and_goes_on(tmp_path, undisturbed, step, capsys):
    stage, finished = counting_stage(12), []
    stage = dataclasses.replace(stage, batches=ToldAt(stage.batches, step), finish=finished.append)
    stopped(tmp_path / "run", stage)
    assert f"told to stop (SIGTERM): counting is saved at step {step} of 12" in capsys.readouterr().out
    assert CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).latest_step() == step
    assert not finished
    assert_ends_as(undisturbed, tmp_path / "run")


def test_an_evaluation_is_given_up_and_made_up_for(tmp_path, undisturbed):
    def slow(state):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass

    stopped(tmp_path / "run", dataclasses.replace(counting_stage(12), evaluate=slow))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert_ends_as(undisturbed, tmp_path / "run")
    # Made up for, and then killed before the next checkpoint: made up for again, and logged once.
    dies = counting_stage(12, source=Broken())
    with pytest.raises(UserError):
        run(tmp_path / "again", dies)
    assert read_metrics(tmp_path / "again")[-1]["held_out/step"] == 4
    assert_ends_as(undisturbed, tmp_path / "again")


def test_the_model_is_of_the_best_checkpoint_also_of_a_disturbed_run(tmp_path, capsys):
    """Step 6 is the nearest to 6; it is a checkpoint, and evaluated if that is done after every second step."""
    logging = SimpleNamespace(**vars(LOGGING) | {"eval_every": 2})
    finished = []
    best = run(tmp_path / "whole", counting_stage(20, finished=finished), logging, model_from="best")
    assert finished == [6] == [int(best.step)]
    assert "the model is of step 6, with the least distance" in capsys.readouterr().out
    for step in (4, 6, 10, 20):  # 4 is evaluated, and saved because the run is told to stop: no checkpoint of the other
        stage = counting_stage(20)
        stage = dataclasses.replace(stage, batches=ToldAt(stage.batches, step))
        stopped(tmp_path / str(step), stage, logging=logging, model_from="best")
        again = run(tmp_path / str(step), counting_stage(20), logging, model_from="best")
        jax.tree.map(np.testing.assert_array_equal, again, best)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, undisturbed, capsys):
    stage = counting_stage(12)
    stopped(tmp_path / "run", dataclasses.replace(stage, batches=ToldAt(stage.batches, 8)))
    path = tmp_path / "run" / "checkpoints" / "8" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert_ends_as(undisturbed, tmp_path / "run")
    said = capsys.readouterr()
    assert "checkpoint 8 in" in said.err
    assert "resuming at step 6" in said.out


def test_a_reader_that_dies_is_named_and_the_last_checkpoint_stays(tmp_path, undisturbed):
    stage = counting_stage(12)

    class Dies(ToldAt):
        def __next__(self):
            self._left -= 1
            if self._left == 0:
                raise RuntimeError("shard 3 is gone")
            return next(self._batches)

    expected = (
        r"counting: the batch of step 8 cannot be read \(RuntimeError: shard 3 is gone\); the checkpoint of step 6 in"
    )
    with pytest.raises(UserError, match=expected):
        run(tmp_path / "run", dataclasses.replace(stage, batches=Dies(stage.batches, 8)))
    assert_ends_as(undisturbed, tmp_path / "run")
    with pytest.raises(UserError, match="step 1 cannot be read .*not a JPEG.*; there is no checkpoint yet"):
        run(tmp_path / "other", counting_stage(12, source=Broken()))


def test_a_full_disk_is_named_and_once_there_is_room_the_run_goes_on(tmp_path, undisturbed, monkeypatch):
    digest_of, written = manifest.digest_of, []

    def refuses_the_third(path):
        written.append(path.parts[path.parts.index("checkpoints") + 1])
        if len(set(written)) == 3:
            raise OSError(28, "No space left on device")
        return digest_of(path)

    monkeypatch.setattr(manifest, "digest_of", refuses_the_third)
    with pytest.raises(UserError, match=r"step 9 cannot .*\(No space left on device\), that of step 6 is whole"):
        run(tmp_path / "run", counting_stage(12))
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "6"]
    assert_ends_as(undisturbed, tmp_path / "run")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which is never empty")
def test_metrics_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"run cannot be written \(No space left on device\); there is no checkpoint yet"
    ):
        run(tmp_path / "run", counting_stage(12))


def test_a_folder_that_vanishes_is_named_and_the_run_goes_on_where_it_is(tmp_path, undisturbed):
    stage = counting_stage(12)

    def vanish(state):
        while not (tmp_path / "run" / "checkpoints" / "3" / "commit_success.txt").is_file():  # the last that is written
            pass
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        return stage.evaluate(state)

    expected = r"cannot be written to .*run/checkpoints \((the folder is gone|No such file or directory)\)"
    with pytest.raises(UserError, match=expected):
        run(tmp_path / "run", dataclasses.replace(stage, evaluate=vanish))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert_ends_as(undisturbed, (tmp_path / "elsewhere"))
