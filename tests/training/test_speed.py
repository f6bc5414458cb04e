"""Speed by a clock that the test sets."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from vgpt_jax.training import speed
from vgpt_jax.training.sharding import make_mesh, of_batches, replicated
from vgpt_jax.training.speed import SpeedMeter, peak_memory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_waits_and_what_is_left_out():
    clock = Clock()
    meter = SpeedMeter(16, make_mesh(), clock)
    assert meter.read(40) == {}
    with meter.waiting_for_input():
        clock.now += 2.0
    clock.now += 6.0
    with meter.left_out():
        clock.now += 50.0
    found = meter.read(44)
    assert (found["step_ms"], found["examples_per_s"], found["input_wait"]) == (2000.0, 8.0, 0.25)
    assert not {"peak_share", "compile_s", "device_peak_gb"} & set(found)  # a CPU says none of these
    clock.now += 1.0
    found = meter.read(45)
    assert (found["step_ms"], found["input_wait"]) == (1000.0, 0.0)
    assert meter.read(45) == {}


def test_share_of_the_peak_is_of_each_device(monkeypatch):
    """Eight devices, each with an eighth of a product of 2 * 64 * 32 * 16 FLOP."""
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1e4)
    mesh, clock = make_mesh(), Clock()
    rows = jax.device_put(jnp.ones((64, 32)), of_batches(mesh))
    matrix = jax.device_put(jnp.ones((32, 16)), replicated(mesh))
    program = jax.jit(jnp.matmul, out_shardings=of_batches(mesh)).lower(rows, matrix).compile()
    meter = SpeedMeter(64, mesh, clock)
    meter.compiled(program, 7.0)
    meter.read(0)
    clock.now += 4.0
    found = meter.read(2)
    assert found["peak_share"] == pytest.approx(2 * 64 * 32 * 16 / 8 / (2.0 * 1e4))
    assert found["compile_s"] == 7.0
    clock.now += 1.0
    assert "compile_s" not in meter.read(3)


def test_memory_is_the_devices_where_it_says_and_else_the_processs():
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 10**9})
    assert peak_memory(device) == {"device_peak_gb": 3.0}
    found = peak_memory(jax.devices("cpu")[0])
    assert list(found) == ["resident_peak_gb"]
    assert 0.05 < found["resident_peak_gb"] < 1000
