"""The table of accelerators."""

import pytest

from vgpt_jax.hardware import ACCELERATORS, peak_flops


@pytest.mark.parametrize(
    "device_kind, dtype, rate",
    [
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),  # v5p, by the name that JAX gives it
        ("TPU v6 lite", "float32", 918e12),  # whose float32 products are done in bfloat16
        ("NVIDIA H100 80GB HBM3", "float32", 494e12),
        ("cpu", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),  # a seventh of one is not one
    ],
)
def test_the_peak_is_that_of_exactly_this_device(device_kind, dtype, rate):
    assert peak_flops(device_kind, dtype) == rate


def test_no_rate_is_off_by_a_power_of_ten():
    """What the devices of these ten years have in common: 60 to 1000 products of bfloat16 for each byte of memory, memory that
    is read as a whole in 10 to 100 ms, and an interconnect that is slower than the memory."""
    for name, device in ACCELERATORS.items():
        assert 60 < device.flops["bfloat16"] / device.memory_rate < 1000, name
        assert 0.01 < device.memory_bytes / device.memory_rate < 0.1, name
        assert 2 < device.memory_rate / device.interconnect_rate < 20, name
