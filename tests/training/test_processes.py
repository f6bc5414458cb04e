"""Several processes as one run, from the command line: the losses of one process, whatever wrote the checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import quick_compile
from vgpt_jax import evaluate, sample
from vgpt_jax.errors import UserError
from vgpt_jax.training import processes
from vgpt_jax.training.processes import cluster_is_around, first_does, join, together
from vgpt_jax.training.saved_model import load_model
from vgpt_jax.training.stages import STAGES

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def flags(tiny_overrides) -> list[str]:
    """Of a small training with what processes have to agree on: a discriminator, surgery, averages, dropout."""
    fields = (
        tiny_overrides
        | {f"{stage}_training.num_steps": STEPS for stage in STAGES}
        | {
            "logging.log_every": 1,
            "logging.eval_every": 6,
            "logging.checkpoint_every": 3,
            "perceptual.name": "none",
            "adversarial.discriminator": "patchgan",
            "adversarial.start": 0,  # one program less to compile, in each process
            "adversarial.warmup_steps": 2,
            "adversarial.ramp_steps": 2,
            "patchgan.ndf": 8,
            "patchgan.num_layers": 1,
            "tokenizer_training.ema_decay": 0.9,
            "vector_quantize.pretrain_steps": 2,
            "vector_quantize.replace_freq": 3,
            "gpt.class_dropout": 0.1,
            "sampling.num": 1,
        }
    )
    return [f"--config.{name}={value}" for name, value in fields.items()]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def run(count: int, arguments: list[str], terminate_at: str | None = None) -> tuple[list[int], list[str]]:
    """Runs ``python -m`` with the arguments in ``count`` processes: their exit statuses, and the output of each.

    ``terminate_at``: all get SIGTERM when the first prints a line that begins so.
    """
    environment = os.environ | quick_compile.ENVIRONMENT
    of_all = ["--coordinator", f"localhost:{free_port()}", "--num_processes", str(count)] if count > 1 else []
    started = []
    for index in range(count):
        mine = [*of_all, "--process_id", str(index)] if count > 1 else []
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *arguments, *mine],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        if terminate_at is not None:
            for line in started[0].stdout:
                if line.startswith(terminate_at):
                    break
            for process in started:
                process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    statuses, outputs = run(1, ["vgpt_jax.main", "--config=configs/emoji.py", f"--workdir={workdir}", *flags])
    assert statuses == [0], outputs
    return workdir


SPLIT = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
SHORT = [  # processes, more flags, and where they are told to stop, if they are
    (2, ["--config.mesh.tensor=2", "--config.stages=classifier"], "classifier  step 4/"),
    (1, ["--config.stages=classifier"], None),
    (2, [], None),
]
LONG = [
    (4, SPLIT, "tokenizer  step 7/"),
    (1, [], "generator  step 5/"),
    (2, ["--config.mesh.tensor=2"], "classifier  step 4/"),
    (4, SPLIT, None),
]


@pytest.fixture(scope="module", params=[SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["short", "long"])
def changing(request, flags, tmp_path_factory) -> Path:
    """The same training, gone on with by other numbers of processes, on other meshes."""
    workdir = tmp_path_factory.mktemp("changing")
    for count, more, stop_at in request.param:
        arguments = ["vgpt_jax.main", "--config=configs/emoji.py", f"--workdir={workdir}", *flags, *more]
        statuses, outputs = run(count, arguments, terminate_at=stop_at)
        assert statuses == [0 if stop_at is None else 75] * count, outputs
        assert not any("step" in output for output in outputs[1:])  # one logs
        if stop_at is not None:
            assert not (workdir / stop_at.split()[0] / "model").exists(), "stopped too late to test anything"
    return workdir


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_parameters_are_those_of_one_process(alone, changing, stage):
    lines = [
        [json.loads(line) for line in (w / stage / "metrics.jsonl").read_text().splitlines()] for w in (alone, changing)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            atol = 1e-6 if name in ("loss", "adversarial", "real_logits", "fake_logits") else 1e-7
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=atol, err_msg=f"{name} of {one['step']}")
    kind = "gpt" if stage == "generator" else stage
    models = [load_model(workdir / stage / "model", kind)[0] for workdir in (alone, changing)]
    weights = [jax.tree.leaves(jax.tree.map(np.asarray, load)) for load in map(state_of, models)]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)


def state_of(model):
    from flax import nnx

    return nnx.state(model, nnx.Param)


def test_the_token_cache_is_the_same(alone, changing):
    for path in sorted((alone / "token_cache").glob("*.npy")):
        np.testing.assert_array_equal(np.load(changing / "token_cache" / path.name), np.load(path))


@pytest.mark.long
def test_two_processes_measure_what_one_does(alone):
    measure = ["--num", "1", "--accept_n", "2", "--workdir", str(alone)]
    evaluate.main(measure)
    expected = json.loads((alone / "evaluation" / "metrics.json").read_text())
    statuses, outputs = run(2, ["vgpt_jax.evaluate", *measure])
    assert statuses == [0, 0], outputs
    found = json.loads((alone / "evaluation" / "metrics.json").read_text())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("seconds"):
            np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_two_processes_draw_what_one_does(alone, tmp_path):
    draw = ["--cls_name", "flags", "animals", "--accept_n", "3", "--from_pretrained", str(alone), "--save_path"]
    sample.main([*draw, str(tmp_path / "one.gif")])
    statuses, outputs = run(2, ["vgpt_jax.sample", *draw, str(tmp_path / "two.gif")])
    assert statuses == [0, 0], outputs
    ids = [
        [p["token_ids"] for p in json.loads((tmp_path / f"{n}.json").read_text())["pictures"]] for n in ("one", "two")
    ]
    assert ids[0] == ids[1]


def test_an_error_of_one_process_ends_all_with_its_line(tmp_path):
    """The second cannot read its pictures."""
    program = (
        "import sys; from vgpt_jax.errors import UserError, exit_on_user_error\n"
        "from vgpt_jax.training.processes import join, together\n"
        "@exit_on_user_error\n"
        "def main():\n"
        "    join(*sys.argv[1:2], int(sys.argv[2]), int(sys.argv[3]))\n"
        "    def read():\n"
        "        if sys.argv[3] == '1': raise UserError('no pictures here')\n"
        "    together(read)\n"
        "main()\n"
    )
    started = start_two(program)
    last = [process.communicate(timeout=120)[1].splitlines()[-1] for process in started]
    assert last == ["error: no pictures here (process 1)", "error: no pictures here"]
    assert [process.returncode for process in started] == [2, 2]


def test_a_process_that_crashes_does_not_wait_for_the_others():
    """The first is busy for a minute; a usual exit of the second would wait for it."""
    program = (
        "import sys, time; from vgpt_jax.training.processes import join\n"
        "join(*sys.argv[1:2], int(sys.argv[2]), int(sys.argv[3]))\n"
        "if sys.argv[3] == '0': time.sleep(60)\n"
        "import jax; print(time.time(), flush=True); raise jax.errors.JaxRuntimeError('UNKNOWN: connection reset')\n"
    )
    busy, crashed = start_two(program)
    try:
        printed, said = crashed.communicate(timeout=50)
        assert crashed.returncode == 1  # by which launchers start it again
        assert time.time() - float(printed) < 10
        assert "Traceback" in said and "connection reset" in said
        assert "another process of this run has died" in said.splitlines()[-1]
    finally:
        busy.kill()
        busy.communicate()


def start_two(program: str) -> list[subprocess.Popen]:
    address = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, address, "2", str(i)], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def test_alone_errors_are_raised_as_they_are(tmp_path):
    done = []
    together(lambda: done.append(1))
    first_does(lambda: done.append(2))
    assert done == [1, 2]
    with pytest.raises(FileNotFoundError):
        first_does((tmp_path / "nothing").read_text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("localhost:1", None, None), "JAX_NUM_PROCESSES, JAX_PROCESS_ID is missing"),
        (("localhost:1", 2, 2), "--process_id is 2, but must be from 0 to"),
        (("localhost:1", 0, 0), "--process_id is 0"),
        (("localhost", 2, 0), "must be host:port"),
        (("localhost:1", "two", 0), "whole numbers"),
    ],
)
def test_what_processes_are_told_wrongly_is_one_line(given, said):
    with pytest.raises(UserError, match=said):
        join(*given)


def test_flags_go_before_the_environment(monkeypatch):
    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: told.update(options))
    for name, value in zip(processes.VARIABLES, ("a:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    join(process_id=2)
    assert (told["coordinator_address"], told["num_processes"], told["process_id"]) == ("a:1", 4, 2)


def test_several_tasks_of_slurm_find_each_other_and_one_need_not(monkeypatch):
    assert cluster_is_around({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    assert not cluster_is_around({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/accel0")
    assert cluster_is_around({})
    assert not cluster_is_around({"JAX_PLATFORMS": "cpu"})
