"""Traces of JAX's profiler, from the command line that a user would type.

In processes of their own: what other tests load may be libtpu, with which there is none.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vgpt_jax.host_memory import tpu_is_here


def main(workdir: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.run(
        [sys.executable, "-m", "vgpt_jax.main", "--config=configs/emoji.py", f"--workdir={workdir}", *flags],
        cwd=Path(__file__).parents[2],
        env=kept | {"XLA_FLAGS": ""} | variables,
        capture_output=True,
        text=True,
    )


def test_some_steps_are_traced(tmp_path, tiny_overrides):
    fields = tiny_overrides | {"classifier_training.num_steps": 8, "stages": "classifier"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    ended = main(tmp_path, "--profile=1:2", *flags, JAX_PLATFORMS="cpu")
    assert ended.returncode == 0, ended.stderr
    assert "traced the steps after 1, 2 at most" in ended.stdout
    assert list((tmp_path / "classifier" / "profile").rglob("*.xplane.pb"))


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed")
@pytest.mark.skipif(tpu_is_here(), reason="there is a TPU here")
def test_libtpu_without_a_tpu_is_one_line_and_no_crash(tmp_path):
    ended = main(tmp_path / "run", "--profile")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: a trace would crash JAX, which has loaded libtpu")
    assert "JAX_PLATFORMS=" in ended.stderr
    assert not (tmp_path / "run").exists()
