"""The lock of a workdir: one run at a time writes to it. The system lets go of it when its holder ends, however that ends."""

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from vgpt_jax.errors import UserError
from vgpt_jax.training.processes import first_does

LOCK = "lock"


@contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Within, no other run can claim ``workdir``. With several processes all call it, and the first holds the lock.

    Where the file system has no locks, that is said on standard error, and the run goes on.

    Args:
      workdir: made if it is not there. Its file ``lock`` says who holds it, or held it last.

    Raises:
      UserError: another run holds it, which is named; or it cannot be written.
    """
    with ExitStack() as held:
        first_does(lambda: _claim(Path(workdir), held))
        yield


def _claim(workdir: Path, held: ExitStack) -> None:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((workdir / LOCK).open("a+b", buffering=0))
        if _is_locked(file, workdir):
            file.truncate(0)
            file.write(json.dumps(me).encode() + b"\n")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written ({error.strerror}): give another --workdir, or make room there"
        ) from error


def _is_locked(file: BinaryIO, workdir: Path) -> bool:
    """Locks the file; False if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{workdir} is in use by another run ({_holder(file)}): wait for it or end it, or give another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        print(f"{workdir} is on a file system without locks: let no other run write to it", file=sys.stderr, flush=True)
        return False
    return True


def _holder(file: BinaryIO) -> str:
    """What the holder of the lock wrote of itself."""
    file.seek(0)
    try:
        told: dict[str, Any] = json.loads(file.read())
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "it has not yet said which"
