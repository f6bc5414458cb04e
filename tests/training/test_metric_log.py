"""Logs of a run that was killed and goes on: what an undisturbed run has, neither a gap nor a step that is there twice."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.training import metric_log
from vgpt_jax.training.metric_log import MetricLog, curves, read_metrics


def log_steps(log: MetricLog, first: int, last: int) -> None:
    """What the loop logs: a line every second step, an evaluation with a picture every fourth."""
    for step in range(first, last + 1):
        if step % 2 == 0:
            log.write(step, {"loss": step / 2})
            log.write_speed(step, {"step_ms": step * 3.0})
        if step % 4 == 0:
            log.write_pictures(step, {"samples": np.full((8, 8, 3), step, np.uint8)})
            log.write(step, {"held_out/loss": step / 4})


def events(directory) -> list[tuple[int, str]]:
    """Step and tag of everything that TensorBoard finds in a folder, sorted."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return sorted(
        (event.step, value.tag)
        for path in (directory / "tensorboard").iterdir()
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    )


def undisturbed(last: int) -> list[tuple[int, str]]:
    scalars = [(s, tag) for s in range(2, last + 1, 2) for tag in ("loss", "speed/step_ms")]
    return sorted(scalars + [(s, tag) for s in range(4, last + 1, 4) for tag in ("samples", "held_out/loss")])


def test_tensorboard_has_every_event_once_wherever_the_run_was_killed(tmp_path):
    log = MetricLog(tmp_path / "run", 0)
    log_steps(log, 1, 8)
    log.flush()()
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    flushed = path.stat().st_size  # the checkpoint of step 8
    log_steps(log, 9, 17)
    log.close()
    whole = path.read_bytes()
    assert events(tmp_path / "run") == undisturbed(17)
    for cut in [flushed, len(whole), *random.Random(0).sample(range(flushed, len(whole)), 6)]:
        shutil.copytree(tmp_path / "run", tmp_path / str(cut))
        (tmp_path / str(cut) / "tensorboard" / path.name).write_bytes(whole[:cut])
        log = MetricLog(tmp_path / str(cut), 8)
        log_steps(log, 9, 20)
        log.close()
        assert events(tmp_path / str(cut)) == undisturbed(20)
        assert [line["step"] for line in metric_log._lines(tmp_path / str(cut) / "speed.jsonl")] == list(
            range(2, 21, 2)
        )


def test_what_is_whole_is_not_written_again(tmp_path):
    log = MetricLog(tmp_path, 0)
    log_steps(log, 1, 8)
    log.close()
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}
    assert len(before) == 3
    MetricLog(tmp_path, 8).close()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths} == before


def test_an_evaluation_that_is_owed_is_logged_once(tmp_path):
    log = MetricLog(tmp_path, 0)
    log_steps(log, 1, 8)
    log.close()
    log = MetricLog(tmp_path, 8, evaluation_owed=True)
    held_out = {"held_out/loss"}
    assert [set(line) - {"step"} for line in read_metrics(tmp_path)[-2:]] == [{"loss"}, {"loss"}]
    log.write_pictures(8, {"samples": np.zeros((8, 8, 3), np.uint8)})
    log.write(8, {"held_out/loss": 2.0})
    log.close()
    assert events(tmp_path) == undisturbed(8)
    assert [line["step"] for line in read_metrics(tmp_path) if set(line) & held_out] == [4, 8]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    lines = [{"step": s, "loss": float(s)} for s in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo')
    log = MetricLog(tmp_path, start_step=4)
    log.write(6, {"loss": 60.0})
    log.close()
    assert read_metrics(tmp_path) == [*lines[:2], {"step": 6, "loss": 60.0}]
    assert curves(tmp_path) == {"loss": [(2, 2.0), (4, 4.0), (6, 60.0)]}


@pytest.mark.parametrize("line", ["[1]", "3", '{"loss": 1.0}', '{"step": "2"}', "[" * 100000, "\0\0", '{"step": 2'])
def test_a_line_that_is_none_ends_what_is_read(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_log, "is_first", lambda: False)
    log = MetricLog(tmp_path, 0, wandb_project="dogs")
    log_steps(log, 1, 8)
    log.flush()()
    log.close()
    assert not list(tmp_path.iterdir())


def test_what_tensorboard_cannot_write_is_an_error_of_the_system(tmp_path):
    log = MetricLog(tmp_path, 0)

    def refuse(step, scalars):
        raise RuntimeError(
            "{{node Flush_device_/job:localhost/device:CPU:0}} /runs/a/tensorboard/events; no room\nfor this"
        )

    log._tensorboard.write_scalars = refuse
    log.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match="TensorBoard's files cannot be written: no room$"):
        log.close()


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
