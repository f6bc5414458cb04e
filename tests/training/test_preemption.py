"""SIGTERM: what ends at once ends at once, what is held back is told, and what is left is as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental import multihost_utils

from vgpt_jax.training import preemption
from vgpt_jax.training.preemption import EXIT_STATUS, GivenUp, given_up_when_told, held_back, listening

ROOT = Path(__file__).parents[2]


def tell_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption._Process.told.wait(60)


def ends_with(script: str, signals: int) -> tuple[int, str]:
    """Status and output of a script that is sent SIGTERM after every line that it prints, so often."""
    with subprocess.Popen(
        [sys.executable, "-c", f"from vgpt_jax.training.preemption import *\nimport hashlib\n{script}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        lines = []
        for _ in range(signals):
            lines.append(process.stdout.readline())
            process.send_signal(signal.SIGTERM)
        lines.append(process.communicate(timeout=120)[0])
        return process.returncode, "".join(lines)


LONG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # a quarter of an hour in C


def test_where_nothing_is_to_be_saved_it_ends_at_once():
    status, said = ends_with(f"with listening():\n  print('ready', flush=True)\n  {LONG}", signals=1)
    assert status == EXIT_STATUS == 75
    assert said == "ready\ntold to stop (SIGTERM): the same command goes on from what is saved\n"


def test_a_second_one_ends_at_once():
    script = f"""
import vgpt_jax.training.preemption as preemption
preemption.AGAIN_SECONDS = 0
with listening(), held_back() as is_time_to_stop:
  print('ready', flush=True)
  while not is_time_to_stop(): pass
  print('told', flush=True)
  {LONG}
"""
    status, said = ends_with(script, signals=2)
    assert status == EXIT_STATUS
    assert said.splitlines()[:2] == ["ready", "told"]


def test_one_right_after_the_first_counts_as_the_same():
    script = """
import time
import vgpt_jax.training.preemption as preemption
preemption.AGAIN_SECONDS = 600
with listening(), held_back() as is_time_to_stop:
  print('ready', flush=True)
  while not is_time_to_stop(): pass
  print('told', flush=True)
  time.sleep(0.5)
  print('saved', flush=True)
"""
    status, said = ends_with(script, signals=2)
    assert status == EXIT_STATUS
    assert said.splitlines()[:3] == ["ready", "told", "saved"]


def test_what_is_held_back_is_told_and_the_handler_is_as_it_was(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, listening(), held_back() as is_time_to_stop:
        assert not is_time_to_stop()
        tell_this_process()
        assert is_time_to_stop()
        preemption.stop("step 7 is saved")
    assert stopped.value.code == EXIT_STATUS
    assert capsys.readouterr().out == "told to stop (SIGTERM): step 7 is saved; the same command goes on from there\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    with held_back() as is_time_to_stop:
        assert not is_time_to_stop()


def test_whoever_did_not_ask_stops_when_nothing_is_held_back_any_more():
    done = []
    with pytest.raises(SystemExit) as stopped, listening():
        with held_back():
            tell_this_process()
            done.append("held back")
        done.append("after")
    assert stopped.value.code == EXIT_STATUS
    assert done == ["held back"]


def test_what_can_be_given_up_is_given_up():
    done = []
    with listening(), pytest.raises(SystemExit), held_back():
        with pytest.raises(GivenUp), given_up_when_told():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                while True:
                    pass
            except Exception:
                done.append("taken for an error")
        assert preemption._Process.told.wait(60)
        with pytest.raises(GivenUp), given_up_when_told():
            done.append("begun when told before")
        done.append("go on")
    assert done == ["go on"]


def test_what_a_child_is_told_is_not_heard_here():
    script = """
import os
with listening():
  mine, its = os.pipe()
  child = os.fork()
  if child == 0:
    os.write(its, b' ')
    signal.alarm(60)
    signal.pause()
  os.read(mine, 1)
  os.kill(child, signal.SIGTERM)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert ends_with(script, signals=0) == (0, f"{-signal.SIGTERM}\n")


def test_several_processes_ask_jax_with_one_number_after_the_other(monkeypatch):
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or step % 3 == 0
    )
    with listening():
        assert signal.getsignal(signal.SIGTERM) is before  # JAX's is not to be replaced
        answers = []
        for _ in range(2):  # two stages
            with held_back() as is_time_to_stop:
                answers += [is_time_to_stop() for _ in range(3)]
    assert asked == list(range(asked[0], asked[0] + 6))  # or one that was told between the two stages would never agree
    assert answers == [step % 3 == 0 for step in asked]
