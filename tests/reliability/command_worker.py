"""Runs command lines of vgpt_jax in a process of their own, one after the other, and outlives neither a crash nor a hang of one.

A fresh interpreter takes seconds to import what it needs. One that is kept takes milliseconds to the next command, and whoever
gave it the command is still there when it hangs or dies. Run as a script this file is that process: requests come as lines of
JSON on its standard input, answers go to its standard output.
"""

import faulthandler
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 16 * 2**30
"""Bytes of addresses that a worker may have: what asks for more fails there, and does not bring the machine down."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: exit status; None where it hung and was killed, negative where a signal ended the process.
      seconds: that it took.
      out, err: what it wrote to standard output and to standard error.
    """

    status: int | None
    seconds: float
    out: str
    err: str


class Worker:
    """A process that runs commands. It is started with the first one, and again after one that took it along.

    Args:
      folder: for the output of the command under way.
      environment: of the process, beside this one's.
      most: commands until it is replaced, as the programs that JAX holds for them take memory.
    """

    def __init__(self, folder: Path, environment: dict[str, str], most: int = 40):
        self._folder, self._environment, self._most, self._process, self._done = folder, environment, most, None, 0
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, module: str, arguments: list[str], environment: dict[str, str], timeout: float) -> Ended:
        """Runs ``main`` of a module, as ``python -m`` would, for at most ``timeout`` seconds."""
        if self._done >= self._most:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=os.environ | self._environment,
            )
        begun, paths = time.monotonic(), [self._folder / name for name in ("out", "err")]
        request = {"module": module, "arguments": arguments, "environment": environment, "paths": list(map(str, paths))}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self._done += 1
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self._process.send_signal(signal.SIGUSR1)  # it writes where it is
            time.sleep(0.2)
        answer = self._process.stdout.readline() if ready else b""
        status = json.loads(answer) if answer else self._end() if ready else None
        if not answer:
            self.close()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in paths)
        return Ended(status, time.monotonic() - begun, out, err)

    def _end(self) -> int:
        """The status of a process that ended of itself: never that of a command, which it would have answered."""
        status = self._process.wait()
        return status if status < 0 else -255

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._process, self._done = None, 0


def serve() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, str(ROOT))

    def refuse(*_, **__):
        raise OSError("there is no network")

    socket.getaddrinfo = socket.socket.connect = refuse
    for line in sys.stdin:
        request = json.loads(line)
        for number, path in enumerate(request["paths"], start=1):
            with open(path, "wb") as file:
                os.dup2(file.fileno(), number)
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        os.environ.update(request["environment"])
        status = _status_of(request["module"], request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(f"{status}\n")
        answers.flush()


def _status_of(module: str, arguments: list[str]) -> int:
    """The exit status that the interpreter would end with."""
    try:
        sys.argv = [module, *arguments]  # where config_flags looks for overrides
        command = importlib.import_module(module).main
        command(sys.argv if module == "vgpt_jax.main" else arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:  # whatever it is, the interpreter would print it and end with 1
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
