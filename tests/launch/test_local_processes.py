"""launch/local_processes.sh: several processes as one; they are bash's here, but for one test."""

import signal
import sys

import pytest

from .conftest import ROOT

WAITS = 'trap "echo told; exit 75" TERM; echo ready; : > ready.$JAX_PROCESS_ID; while :; do sleep 0.05; done'
OTHER_IS_READY = "until [ -e ready.0 ]; do sleep 0.05; done"


@pytest.fixture
def bash(launchers):
    launchers.variables["INTERPRETER"] = "/bin/bash"
    return launchers


def test_each_process_is_told_who_it_is_and_its_lines_are_numbered(bash):
    tells = "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS on $JAX_PLATFORMS; printf oops >&2"
    status, out, err = bash.run("local_processes.sh", "3", "-c", tells)
    lines = sorted(out.splitlines())
    address = lines[0].split()[5]
    assert status == 0 and address.startswith("127.0.0.1:")
    assert lines == [f"[{i}] {i} of 3 at {address} on cpu" for i in range(3)]
    assert sorted(err.splitlines()) == [f"[{i}] oops" for i in range(3)]


@pytest.mark.parametrize("ended", [2, 9, 75])
def test_when_one_fails_all_are_told_and_its_status_is_that_of_all(bash, ended):
    script = f"[ $JAX_PROCESS_ID = 0 ] || {{ {OTHER_IS_READY}; exit {ended}; }}; {WAITS}"
    status, out, err = bash.run("local_processes.sh", "2", "-c", script)
    assert status == ended and "[0] told" in out.splitlines()
    assert err.splitlines()[0] == f"process 1 ended with status {ended}"


def test_one_that_does_not_end_is_killed(bash):
    deaf = f'[ $JAX_PROCESS_ID = 0 ] || {{ {OTHER_IS_READY}; exit 9; }}; trap "" TERM; : > ready.0; while :; do sleep 0.05; done'
    status, _, err = bash.run("local_processes.sh", "2", "-c", deaf, GRACE="0")
    assert status == 9 and "process 0 ended" not in err  # the first that failed is named


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_all_as_term(bash, number):
    process = bash.start("local_processes.sh", "2", "-c", WAITS)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(out.splitlines()) == ["[0] told", "[1] told"]


def test_two_processes_of_jax_find_each_other(launchers):
    program = (
        "from vgpt_jax.training import processes; processes.join(); import jax; "
        "print(jax.process_index(), jax.process_count(), jax.device_count(), jax.default_backend())"
    )
    variables = {"INTERPRETER": sys.executable, "PYTHONPATH": str(ROOT)}
    status, out, err = launchers.run("local_processes.sh", "2", "-c", program, **variables)
    assert (status, sorted(out.splitlines())) == (0, ["[0] 0 2 2 cpu", "[1] 1 2 2 cpu"]), err


def test_a_dry_run_prints_each_process(launchers):
    lines = launchers.dry_run("local_processes.sh", "2", "-m", "vgpt_jax.main", "--workdir=a b")
    python = str(launchers.root / ".venv/bin/python")
    for i, line in enumerate(lines):
        assert line[0] == "JAX_PLATFORMS=cpu" and line[2:] == [
            "JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={i}", python, "-m", "vgpt_jax.main", "--workdir=a b"
        ]  # fmt: skip
    assert len(lines) == 2 and lines[0][1] == lines[1][1]


def test_what_is_not_sound_is_said(bash):
    assert "the number of processes is '0'" in bash.error("local_processes.sh", "0", "-c", "true")
    assert "the number of processes is '-m'" in bash.error("local_processes.sh", "-m", "vgpt_jax.main")
    assert "nothing to run" in bash.error("local_processes.sh", "2")
