"""A copy of the launchers beside a project that is not there, and commands of clusters that only note how they were called."""

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLATFORMS = (
    "gcloud",
    "kubectl",
    "docker",
    "sbatch",
    "srun",
    "squeue",
    "scancel",
    "scontrol",
    "sudo",
    "curl",
    "gcsfuse",
)


class Launchers:
    """The scripts of launch/ in a folder of their own, and the stubs that their commands find first.

    Attributes:
      root: the folder that they take for the repository.
      variables: the environment of what is run; a test adds to it.
    """

    def __init__(self, folder: Path):
        self.root, self._bin, self._calls = folder / "repository", folder / "bin", folder / "calls"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        environment = 'environment() { mkdir -p .venv/bin; echo "environment [$1]"; python="$PWD/.venv/bin/python"; }'
        found = "find_python() { echo python3; }"
        home = 'cd "$(dirname "${BASH_SOURCE[0]}")/.."'
        (self.root / "launch" / "environment.sh").write_text(f"{home}\n{found}\n{environment}\n")
        for name in ("README.md", "LICENSE", "pyproject.toml", "requirements.txt", "configs", "vgpt_jax"):
            (self.root / name).write_text(name)
        self._bin.mkdir()
        for name in PLATFORMS:
            self.stub(name, "exit 97")
        self.variables = {"PATH": f"{self._bin}:/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)}

    def stub(self, name: str, script: str) -> None:
        """Makes a command of that name: it notes its arguments, then does what the script says."""
        path = self._bin / name
        path.write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" $\'\\n\' >> {shlex.quote(str(self._calls))}\n{script}\n'
        )
        path.chmod(0o755)

    def calls(self, *names: str) -> list[list[str]]:
        """The calls of the stubs, or of those named, since this was last asked."""
        if not self._calls.exists():
            return []
        calls = [call.split("\0")[:-1] for call in self._calls.read_text().split("\n\0") if call]
        self._calls.unlink()
        return [call for call in calls if not names or call[0] in names]

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        """Starts a launcher; its output is read through pipes, in text."""
        return subprocess.Popen(
            # Whoever runs the tests may ignore these two, which bash could then not catch.
            ["env", "--default-signal=INT,HUP", "bash", str(self.root / "launch" / script), *arguments],
            env=self.variables | variables,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Runs a launcher to its end: its exit status, what it printed, and its errors."""
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def dry_run(self, script: str, *arguments: str, **variables: str) -> list[list[str]]:
        """What a launcher says that it would run: its lines as words, without comments. Nothing is run, no file is made."""
        before = self.files()
        status, out, err = self.run(script, "--dry-run", *arguments, **variables)
        assert (status, err) == (0, "")
        assert self.calls() == [] and self.files() == before
        return [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]

    def error(self, script: str, *arguments: str, **variables: str) -> str:
        """The one line that a launcher says of what is wrong, before it has done anything."""
        status, out, err = self.run(script, *arguments, **variables)
        assert (status, out) == (2, "") and self.calls() == []
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    def files(self) -> list[str]:
        return sorted(str(path) for path in self.root.parent.rglob("*"))


@pytest.fixture
def launchers(tmp_path) -> Launchers:
    return Launchers(tmp_path)


def first_line(process: subprocess.Popen) -> str:
    """Waits until a process has printed a line."""
    return process.stdout.readline()


def wait_until(happened: Callable[[], bool]) -> None:
    """Gives another process the time to do something, at most a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
