"""SIGTERM: the run is told to stop, saves, and ends with a status by which launchers know to start it again.

Before and between the stages' loops nothing is to be saved, and the process ends at once. Within a loop (`held_back`) it ends
after the step under way; an evaluation is given up (`given_up_when_told`). A second SIGTERM, seconds later, ends it at once.

Of several processes one may be told before the others, and all must stop after the same step: JAX, whose own handler of SIGTERM
is left in place, makes them agree on one. There an evaluation is finished first, and a second SIGTERM does nothing.
"""

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from vgpt_jax.training.processes import say

EXIT_STATUS = os.EX_TEMPFAIL
"""75: stopped because it was told to; the same command goes on from there."""

AGAIN_SECONDS = 5
"""A SIGTERM counts as the second after so long: a system that shuts down and a launcher that hears of it both send the first."""

TOLD = "told to stop (SIGTERM)"


class GivenUp(BaseException):  # or what is given up could take it for an error of its own
    """Raised within `given_up_when_told`."""


class _Process:
    """What is known of SIGTERM in this process; ``lock`` is held to look at ``holding`` and ``told`` together."""

    lock = threading.Lock()
    told = threading.Event()
    told_at = 0.0  # seconds, of the first SIGTERM
    holding = False
    giving_up = False
    listening = False
    questions = itertools.count(1)  # to JAX: one for every step that this process has taken


@contextmanager
def listening() -> Iterator[None]:
    """Within, SIGTERM is dealt with as said above. For the main thread of a command line, after `processes.join`."""
    if jax.distributed.is_initialized():
        yield
        return
    # A handler in Python waits until the main thread is back from C++, where a compilation takes minutes. The interpreter writes
    # the signal's number to the socket at once, and a thread of its own can act on it.
    listener, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    _Process.told.clear()
    _Process.listening = True
    watcher = threading.Thread(target=_watch, args=(listener,), name="SIGTERM", daemon=True)
    handler = signal.signal(signal.SIGTERM, _in_main_thread)
    descriptor = signal.set_wakeup_fd(wake_up.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        _Process.listening = False
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        wake_up.close()  # ends the thread
        watcher.join()
        listener.close()
        _Process.told.clear()


def _listen_no_longer() -> None:
    """In a process that was forked: what is told to that would be heard here."""
    if _Process.listening:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_listen_no_longer)


def _watch(listener: socket.socket) -> None:
    while received := listener.recv(64):
        for _ in range(received.count(signal.SIGTERM)):
            with _Process.lock:
                again = _Process.told.is_set()
                if again and time.monotonic() - _Process.told_at < AGAIN_SECONDS:
                    continue
                if not _Process.holding or again:
                    os.write(1, f"{TOLD}: the same command goes on from what is saved\n".encode())
                    os._exit(EXIT_STATUS)  # what is written is written whole, or again
                _Process.told_at = time.monotonic()
                _Process.told.set()


def _in_main_thread(*_) -> None:
    if _Process.giving_up:
        _Process.giving_up = False
        raise GivenUp


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM does not end the process. Gives a function that says whether to stop, to be called after every step, by all
    processes; whoever it says so to saves and ends with ``EXIT_STATUS``."""
    with _Process.lock:
        _Process.holding = True
    try:
        yield _is_time_to_stop
    finally:
        with _Process.lock:
            _Process.holding = False
            told = _Process.told.is_set()
    if told:  # since it was asked last
        stop("all was done that was to be saved")


def stop(saved: str) -> NoReturn:
    """Says what was saved, and ends the process."""
    say(f"{TOLD}: {saved}; the same command goes on from there")
    raise SystemExit(EXIT_STATUS)


def _is_time_to_stop() -> bool:
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(next(_Process.questions))
    return _Process.told.is_set()


@contextmanager
def given_up_when_told() -> Iterator[None]:
    """Within, SIGTERM raises `GivenUp`, now or at once if it was there before."""
    _Process.giving_up = True
    try:
        if _Process.told.is_set():
            raise GivenUp
        yield
    finally:
        _Process.giving_up = False
