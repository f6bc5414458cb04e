"""Several processes as one run: how they find each other, who writes, and how an error of one becomes the error of all.

On a TPU pod every host runs one process, on GPU nodes one for each node or GPU, on a laptop there is one in all. Every process
runs the same program; the arrays of a step are spread over the devices of all of them. What is written once, the first writes.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vgpt_jax.errors import UserError, leave
from vgpt_jax.host_memory import tpu_is_here
from vgpt_jax.progress import progress

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What says of a process where the first is, how many there are, and which it is; each has a flag that goes before it."""

HEARTBEAT_SECONDS = 60
"""After so long a process that died is missed by the others, which then end too."""

JOIN_SECONDS = 600
"""For so long processes wait for each other at the start: of a cluster some may begin minutes later."""

MESSAGE_BYTES = 4096


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, if there are any; before anything else is asked of JAX.

    Where nothing is given, the environment says: ``VARIABLES``; Slurm's, for ``srun`` with several tasks; that of a TPU host.
    Kubernetes is told by ``VARIABLES`` (launch/kubernetes).

    Args:
      coordinator: ``host:port`` of the first process.
      num_processes: of the run.
      process_id: of this one, from 0.

    Raises:
      UserError: only a part is given, or it is not sound. Where a process does not come in time, JAX ends this one (status 134).
    """
    given = [coordinator, num_processes, process_id]
    for i, name in enumerate(VARIABLES):
        if given[i] is None and os.environ.get(name):
            given[i] = os.environ[name]
    if any(value is not None for value in given):
        missing = [name for name, value in zip(VARIABLES, given, strict=True) if value is None]
        if missing:
            flags = ", ".join("--" + name.removeprefix("JAX_").lower().replace("_address", "") for name in missing)
            raise UserError(
                f"of several processes each must be told all three: {flags} or {', '.join(missing)} is missing"
            )
        try:
            count, index = int(given[1]), int(given[2])
        except ValueError:
            raise UserError(f"--num_processes {given[1]} and --process_id {given[2]} must be whole numbers") from None
        if count < 1 or not 0 <= index < count:
            raise UserError(f"--process_id is {index}, but must be from 0 to --num_processes - 1, which is {count - 1}")
        host, _, port = str(given[0]).rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator is {given[0]!r}, but must be host:port, such as 10.0.0.1:8476")
        options = {"coordinator_address": str(given[0]), "num_processes": count, "process_id": index}
    elif cluster_is_around(os.environ):
        options = {}
    else:
        return
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run did not find each other: {str(error).splitlines()[0]}") from error
    if jax.process_count() > 1:
        leave.append(os._exit)
        sys.excepthook = _crash


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Ends a process that failed at once; at a usual exit it would wait for the others, which miss it no sooner."""
    sys.__excepthook__(kind, error, trace)
    if issubclass(kind, jax.errors.JaxRuntimeError):
        print(
            "error: perhaps another process of this run has died, which will say why: start all again", file=sys.stderr
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def cluster_is_around(environment: Mapping[str, str]) -> bool:
    """Whether JAX will find the other processes by itself: several tasks of a Slurm step, or a TPU host."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return True
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    return tpu_is_here() and "tpu" in platforms and not environment.get("TPU_SKIP_MDS_QUERY")


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once."""
    if is_first():
        print(text, flush=True)


def progress_once(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`progress`, shown by the first process only."""
    return progress(items, what, total) if is_first() else iter(items)


def together(*functions: Callable[[], None]) -> None:
    """Calls the functions in every process, one after the other; an error in any of them is raised in all, which so end
    with one message instead of waiting for each other.

    Raises:
      UserError: the message of the first process that raised one.
    """
    for function in functions:
        message = ""
        try:
            function()
        except (UserError, OSError) as error:
            if jax.process_count() == 1:
                raise
            message = str(error) or type(error).__name__
        if jax.process_count() == 1:
            continue
        for index, found in enumerate(_shared(message)):
            if found:
                whose = "" if message == found else f" (process {index})"
                raise UserError(found + whose)


def first_does(*functions: Callable[[], None]) -> None:
    """`together`, but only the first process calls them."""
    together(*((function if is_first() else lambda: None) for function in functions))


def _shared(message: str) -> Sequence[str]:
    """The messages of all processes, in all."""
    mine = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = message.encode()[:MESSAGE_BYTES]
    mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.reshape(-1, MESSAGE_BYTES)]
