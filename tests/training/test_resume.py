"""A run that is killed in the middle of every stage ends, bit for bit, where an undisturbed one does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("tokenizer", "generator", "classifier")


@pytest.fixture(scope="module")
def command(tiny_overrides):
    """The command line of a small training, without its workdir."""
    steps = {f"{stage}_training.num_steps": 120 for stage in STAGES} | {
        "logging.log_every": 1,
        "logging.eval_every": 60,
    }
    adversary = {  # begins before the kill, is heard after it
        "adversarial.discriminator": "patchgan",
        "adversarial.start": 30,
        "adversarial.warmup_steps": 40,
        "adversarial.ramp_steps": 20,
        "adversarial.lecam_weight": 0.01,
        "vector_quantize.learning": "ema",
        "vector_quantize.init_method": "kmeans",
        "patchgan.num_layers": 1,
        "patchgan.ndf": 8,
        "patchgan.spectral_norm": True,
        "tokenizer_training.ema_decay": 0.9,
    }
    fields = tiny_overrides | steps | adversary
    flags = [f"--config.{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in fields.items()]
    return [sys.executable, "-m", "vgpt_jax.main", "--config=configs/emoji.py", *flags]


def run(command, workdir: Path, kill_at: str | None = None) -> list[str]:
    """Runs the command, or kills it with SIGKILL as soon as it prints a line that begins with ``kill_at``."""
    environment = os.environ | {"XLA_FLAGS": ""}
    with subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_at is not None and line.startswith(kill_at):
                process.send_signal(signal.SIGKILL)
                kill_at = None
    assert kill_at is None, f"never printed {kill_at!r}:\n{''.join(lines)}"
    assert process.returncode in (0, -signal.SIGKILL), "".join(lines)
    return lines


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(command, workdir)
    return workdir


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("killed")
    for stage in STAGES:
        run(command, workdir, kill_at=f"{stage}  step 47/120")
        assert not (workdir / stage / "model").exists(), "the kill came too late to test anything"
    lines = run(command, workdir)
    assert any(line.startswith("classifier: resuming at step") for line in lines)
    return workdir


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_of_all_steps_are_bit_identical(undisturbed, killed, stage):
    expected = (undisturbed / stage / "metrics.jsonl").read_text()
    assert len(expected.splitlines()) == 120 + 2
    assert (killed / stage / "metrics.jsonl").read_text() == expected


@pytest.mark.parametrize("stage", STAGES)
def test_final_parameters_are_bit_identical(undisturbed, killed, stage):
    fingerprints = [
        json.loads((w / stage / "model" / "metadata.json").read_text())["fingerprint"] for w in (undisturbed, killed)
    ]
    assert fingerprints[0] == fingerprints[1]


def test_a_finished_run_is_skipped(command, killed):
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*") if path.is_file()}
    lines = run(command, killed)
    assert [line.split(",")[0].strip() for line in lines if "finished before" in line] == [
        f"{s}: finished before" for s in STAGES
    ]
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*") if path.is_file()} == before
