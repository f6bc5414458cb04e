"""launch/slurm.sh: what is submitted, and what the job does with each way in which training can end."""

import pytest

from .conftest import wait_until

TRAIN = "--config=configs/emoji.py --workdir=runs/slurm"
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "TRAIN": TRAIN, "PAUSE": "0", "CRASHES": "1"}


@pytest.fixture
def slurm(launchers):
    launchers.stub("squeue", "cat jobs 2> /dev/null || true")
    for name in ("sbatch", "scontrol", "scancel"):
        launchers.stub(name, "exit 0")
    return launchers


def options(call):
    return dict(word.removeprefix("--").split("=", 1) for word in call if word.startswith("--") and "=" in word)


def test_a_dry_run_says_what_is_submitted_and_what_the_job_runs(launchers):
    set_up, folder, sbatch, job, requeue = launchers.dry_run(
        "slurm.sh", "submit", TRAIN=TRAIN, NODES="4", PARTITION="gpu"
    )
    assert set_up[:2] == ["bash", "-c"] and set_up[-1] == "cuda" and folder == ["mkdir", "-p", "runs"]
    assert sbatch[0] == "sbatch" and sbatch[-2:] == ["launch/slurm.sh", "job"] and "--requeue" in sbatch
    assert options(sbatch) == {
        "job-name": "vgpt",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "time": "24:00:00",
        "chdir": str(launchers.root),
        "signal": "TERM@300",  # to the steps, not to the batch shell, which would be B:TERM@300
        "open-mode": "append",
        "output": "runs/vgpt.log",
        "partition": "gpu",
    }
    assert job == [
        "env", "ON_75=end", "bash", "launch/again.sh", "env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7",
        "srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "vgpt_jax.main", *TRAIN.split(),
    ]  # fmt: skip
    assert requeue == ["scontrol", "requeue", "SLURM_JOB_ID"]


def test_one_process_for_each_gpu(launchers):
    variables = {"PROCESS_PER": "gpu", "GPUS": "4", "CPUS": "6", "SBATCH_MORE": "--exclusive --mem=0"}
    _, _, sbatch, job, _ = launchers.dry_run("slurm.sh", "submit", TRAIN=TRAIN, **variables)
    assert options(sbatch)["ntasks-per-node"] == "4" and options(sbatch)["cpus-per-task"] == "6"
    assert {"--exclusive", "--mem=0"} < set(sbatch)
    assert not any("JAX_LOCAL_DEVICE_IDS" in word for word in job)  # JAX gives each the GPU of its number
    assert "--cpus-per-task=6" in job


def test_nodes_without_gpus(launchers):
    _, _, sbatch, job, _ = launchers.dry_run("slurm.sh", "submit", GPUS="0", TRAIN=TRAIN)
    assert "gpus-per-node" not in options(sbatch) and not any("JAX_LOCAL" in word for word in job)


def test_what_is_submitted_is_not_submitted_twice(slurm):
    assert slurm.run("slurm.sh", "submit") == (0, "environment [cuda]\n", "")
    assert [call[0] for call in slurm.calls()] == ["squeue", "sbatch"]
    (slurm.root / "jobs").write_text("17\n")
    assert slurm.run("slurm.sh", "submit") == (0, "vgpt is there: job 17\n", "")
    assert [call[0] for call in slurm.calls()] == ["squeue"]


def test_the_job_is_handed_what_was_edited(slurm):
    slurm.stub("sbatch", 'echo "$RUN_NAME $GPUS $PROCESS_PER $TRAIN"')
    _, out, _ = slurm.run("slurm.sh", "submit", TRAIN=TRAIN, RUN_NAME="mine", GPUS="2")
    assert out.splitlines()[-1] == f"mine 2 node {TRAIN}"


@pytest.mark.parametrize(
    ("statuses", "runs", "requeued"),
    [([0], 1, False), ([2], 1, False), ([75], 1, True), ([9, 75], 2, True), ([9, 9], 2, False)],
)
def test_the_job_goes_back_into_the_queue_only_after_75(slurm, statuses, runs, requeued):
    n = 'n=$(cat n 2> /dev/null || echo 0); echo $((n + 1)) > n; echo "$JAX_LOCAL_DEVICE_IDS"'
    slurm.stub("srun", f"{n}; set -- {' '.join(map(str, statuses))}; shift $n; exit $1")
    status, out, _ = slurm.run("slurm.sh", "job", GPUS="2", **JOB)
    calls = slurm.calls()
    assert status == statuses[-1] and out.splitlines()[1] == "0,1"
    step = ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "vgpt_jax.main", *TRAIN.split()]
    assert calls == [step] * runs + [["scontrol", "requeue", "17"]] * requeued


def test_a_job_that_is_told_itself_saves_and_does_not_come_back(slurm):
    slurm.stub("srun", 'trap "exit 75" TERM; echo $$ > step.part; mv step.part step; while :; do sleep 0.05; done')
    slurm.stub("scancel", "kill -TERM $(cat step)")
    process = slurm.start("slurm.sh", "job", **JOB)
    assert process.stdout.readline() == "vgpt: job 17, start 1, on node[1-2]\n"
    wait_until((slurm.root / "step").exists)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    calls = slurm.calls("scancel", "scontrol")
    assert (process.returncode, out, calls) == (75, "", [["scancel", "--signal=TERM", "17"]])


def test_stop_ends_what_waits_and_tells_what_runs(slurm):
    assert slurm.run("slurm.sh", "stop")[1] == "vgpt is neither queued nor running\n"
    (slurm.root / "jobs").write_text("17\n18\n")
    slurm.calls()
    assert slurm.run("slurm.sh", "stop")[0] == 0
    one, other = ([["scancel", "--state=PENDING", n], ["scancel", "--batch", "--signal=TERM", n]] for n in ("17", "18"))
    assert slurm.calls("scancel") == one + other


def test_what_is_not_sound_is_said(launchers):
    for variables, text in [
        ({"NODES": "0"}, "NODES is '0'"),
        ({"PROCESS_PER": "core"}, "PROCESS_PER is 'core', but must be one of: node gpu"),
        ({"PROCESS_PER": "gpu", "GPUS": "0"}, "set GPUS"),
    ]:
        assert text in launchers.error("slurm.sh", "submit", **variables)
    launchers.stub("squeue", "exit 1")
    status, _, err = launchers.run("slurm.sh", "submit")
    assert (status, err) == (2, "error: squeue does not answer\n") and launchers.calls("sbatch") == []
