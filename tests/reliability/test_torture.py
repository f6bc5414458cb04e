"""The short form of `torture.py`: a run that is disturbed in every stage ends, bit for bit, where an undisturbed one does."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest

import quick_compile

sys.path.insert(0, str(Path(__file__).parent))

import torture  # noqa: E402
from torture import STAGES, Disturbance  # noqa: E402

SCHEDULE = [
    (Disturbance("kill", "tokenizer  step 47/"), "killed"),
    (Disturbance("damage", "tokenizer  step 95/"), "killed"),
    (Disturbance("terminate", "generator  step 63/"), "told"),
    (Disturbance("full_disk", "classifier  step 47/"), "refused"),
]


@pytest.fixture(scope="module")
def run(tiny_overrides):
    return partial(torture.run, torture.command(tiny_overrides), environment=quick_compile.ENVIRONMENT)


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def disturbed(run, tmp_path_factory):
    """The workdir, and the output of its last, undisturbed, run; it lies on a small disk, where one can be mounted."""
    disk = tmp_path_factory.mktemp("disk")
    with torture.small_disk(disk, 64) as is_small:
        said = {}
        for disturbance, expected in SCHEDULE:
            if disturbance.kind == "full_disk" and not is_small:
                continue
            ended, said[disturbance.kind] = run(disk / "run", disturbance)
            assert ended == expected, "the disturbance came too late to test anything"
        ended, said["last"] = run(disk / "run")
        assert ended == "done"
        yield disk / "run", said


def test_weights_and_metrics_are_bit_identical(undisturbed, disturbed):
    expected, found = torture.outcome(undisturbed), torture.outcome(disturbed[0])
    assert len(expected) == 2 * len(STAGES)
    assert all(metrics.count("\n") == 120 + 2 for name, metrics in expected.items() if name.endswith("metrics"))
    assert found == expected


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(disturbed):
    _, said = disturbed
    assert any("damaged" in line and "checkpoint" in line for line in said["terminate"])
    resumed = [line for line in said["terminate"] if line.startswith("tokenizer: resuming at step")]
    # Of 95 steps, saved every ten while training goes on: the newest was that of 80 or 90, and is lost.
    assert [int(line.split()[-1]) for line in resumed] in ([70], [80])


def test_a_full_disk_is_one_line_and_the_last_checkpoint_good(disturbed):
    _, said = disturbed
    if "full_disk" not in said:
        pytest.skip("no tmpfs can be mounted here")
    last = said["full_disk"][-1]  # of the log or of a checkpoint, whichever was first without room
    assert "No space left on device" in last
    assert re.search(r"that of step \d+ is whole|the checkpoint of step \d+ in .* is good", last)


def test_a_finished_run_is_skipped_and_left_as_it_is(run, disturbed):
    workdir, _ = disturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    _, lines = run(workdir)
    finished = [line.split(",")[0].strip() for line in lines if "finished before" in line]
    assert finished == [f"{stage}: finished before" for stage in STAGES]
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before
