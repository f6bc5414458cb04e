"""One run at a time: who comes second is told who is there; whoever is killed has let go."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.training.workdir_lock import claimed

HOLD = "import sys, signal; from vgpt_jax.training.workdir_lock import claimed\n"
HOLD += "with claimed(sys.argv[1]): print('held', flush=True); signal.pause()"


def test_another_run_is_named_and_once_it_is_killed_the_lock_is_free(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, claimed(tmp_path / "run"):
            pass
        holder.send_signal(signal.SIGKILL)
    who = re.escape(f"process {holder.pid} on {socket.gethostname()}, since ") + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    assert re.search(who, str(refused.value))
    with claimed(tmp_path / "run"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "run" / "lock").read_text()


def test_the_lock_is_free_after_an_error_and_says_nothing_of_the_last_holder_but_one(tmp_path):
    (tmp_path / "lock").write_text("x" * 1000)
    for _ in range(2):
        with pytest.raises(KeyError), claimed(tmp_path):
            raise KeyError
    assert (tmp_path / "lock").read_text().count("\n") == 1


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"), claimed(tmp_path):
            pass


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        pass
    assert "without locks" in capsys.readouterr().err


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), claimed(tmp_path / "file" / "run"):
        pass
