"""What all launchers share: lines that a shell reads back as they were meant, errors of one line, dry runs without effect."""

import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
WORDS = ["plain", "", "two words", "it's", "$HOME", "`id`", 'say "so"', "a&b|c;d", "back\\slash", "*", "--x=a b", "ü"]


def test_a_shell_reads_the_words_back():
    command = f'source {shlex.quote(str(LAUNCH / "dry_run.sh"))}; quoted "$@"'
    line = subprocess.run(["bash", "-c", command, "-", *WORDS], capture_output=True, text=True, check=True).stdout
    assert shlex.split(line) == WORDS
    again = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert again.split("\n")[:-1] == WORDS


@pytest.mark.parametrize("value", ["", "-1", "1.5", "many", "0", "1234567890"])
def test_what_is_no_number_of_at_least_one_is_refused(value):
    command = f'source {shlex.quote(str(LAUNCH / "dry_run.sh"))}; check_number NODES "$1" 1; check_number NODES 007 7'
    done = subprocess.run(["bash", "-c", command, "-", value], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: NODES is '{value}', but must be a whole number of at least 1\n",
    )


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_the_script_is_bash(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", ["again.sh", "local_processes.sh", "slurm.sh", "kubernetes.sh", "tpu_vm.sh"])
def test_without_arguments_a_launcher_says_how_it_is_called(launchers, script):
    assert script in launchers.error(script, NFS="host:/share") or "number of processes" in launchers.error(script)
