"""How fast training is: a step's time, its share of what the devices could do, the wait for data, memory."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from vgpt_jax.hardware import peak_flops
from vgpt_jax.training.compiled_cost import cost_of


class SpeedMeter:
    """Measures the steps between two readings. Every process measures itself.

    Args:
      batch_size: examples of a step, over all devices.
      mesh: devices.
      clock: seconds.
    """

    def __init__(self, batch_size: int, mesh: Mesh, clock: Callable[[], float] = time.perf_counter):
        self._batch_size, self._clock = batch_size, clock
        self._device = mesh.local_devices[0]
        self._peak = peak_flops(self._device.device_kind)
        self._flops: float | None = None
        self._compiling: float | None = None
        self._step: int | None = None
        self._since = self._waited = self._left_out = 0.0

    def compiled(self, program: jax.stages.Compiled, seconds: float) -> None:
        """Tells of a step's program, which is in use from here on, and how long its compilation took."""
        try:
            self._flops = cost_of(program).flops if self._peak else None
        except (jax.errors.JaxRuntimeError, KeyError, ValueError):  # the text of a compiler that is newer than jaxlib
            self._flops = None
        self._compiling = seconds

    @contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Within, the step waits for its batch."""
        begun = self._clock()
        yield
        self._waited += self._clock() - begun

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, something is done that is no step."""
        begun = self._clock()
        yield
        self._left_out += self._clock() - begun

    def read(self, step: int) -> dict[str, float]:
        """What there is to say of the steps since the last reading, up to ``step``; nothing the first time, which begins.

        Returns:
          ``step_ms``: milliseconds a step. ``examples_per_s``: over all devices. ``input_wait``: share of the time that was spent
          waiting for batches, 0..1. ``peak_share``: FLOP/s of the program's matrix products and convolutions over the device's
          peak in bfloat16, 0..1, where one is known. ``device_peak_gb`` or, where the device does not say, ``resident_peak_gb``
          of the process: the most memory in use so far. ``compile_s``: after a compilation.
        """
        now, found = self._clock(), {}
        if self._step is not None and step > self._step:
            seconds = max(now - self._since - self._left_out, 1e-9) / (step - self._step)
            found["step_ms"] = 1000 * seconds
            found["examples_per_s"] = self._batch_size / seconds
            found["input_wait"] = self._waited / (seconds * (step - self._step))
            if self._flops and self._peak:
                found["peak_share"] = self._flops / (seconds * self._peak)
            found |= peak_memory(self._device)
            if self._compiling is not None:
                found["compile_s"] = self._compiling
                self._compiling = None
        self._step, self._since, self._waited, self._left_out = step, now, 0.0, 0.0
        return found


def peak_memory(device: jax.Device) -> dict[str, float]:
    """The most memory that was in use, in units of 1e9 bytes, under a name that says whose."""
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if in_use is not None:
        return {"device_peak_gb": in_use / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return {"resident_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
