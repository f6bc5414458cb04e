"""Traces of JAX's profiler."""

from pathlib import Path
from typing import Any

import jax

from vgpt_jax.errors import UserError
from vgpt_jax.training.processes import is_first, say


def check_profiler() -> None:
    """Sees that a trace can be begun. Where libtpu is loaded and there is no TPU, its part of the profiler ends the process.

    Raises:
      UserError: that is so.
    """
    libraries = Path("/proc/self/maps")
    if jax.default_backend() != "tpu" and libraries.is_file() and "libtpu" in libraries.read_text():
        raise UserError(
            "a trace would crash JAX, which has loaded libtpu though there is no TPU here: run the same command with "
            f"JAX_PLATFORMS={'cuda' if jax.default_backend() == 'gpu' else jax.default_backend()} before it"
        )


class Trace:
    """The trace of some steps, by the first process.

    Args:
      start: steps done when the run begins.
      profile: after how many more the trace begins, and of how many it is; None: there is none.
      directory: where it goes.
    """

    def __init__(self, start: int, profile: tuple[int, int] | None, directory: Path):
        self._first = start + profile[0] if profile and is_first() else None
        self._last = self._first + profile[1] if self._first is not None else None
        self._directory, self._begun = directory, False

    def after(self, step: int, of_step: Any) -> None:
        """To be called when a step was begun, with arrays that it gives."""
        if step in (self._first, self._last):
            jax.block_until_ready(of_step)
            if step == self._last:
                self.end()
            else:
                jax.profiler.start_trace(str(self._directory))
                self._begun = True

    def end(self) -> None:
        """Ends the trace, if it was begun and has not ended."""
        if self._begun:
            jax.profiler.stop_trace()
            self._begun = False
            say(f"traced the steps after {self._first}, {self._last - self._first} at most: {self._directory}")
