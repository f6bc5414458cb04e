"""What accelerators can do at best, by their makers' data sheets: the rates that a compiled program is held against."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device, as JAX counts them: a chip of a TPU, a GPU.

    Attributes:
      flops: dtype -> FLOP/s of dense matrix products. "float32" of GPUs is TF32, of which JAX makes use by default.
      memory_bytes: of the main memory, what programs get of it.
      memory_rate: bytes/s to and from that.
      interconnect_rate: bytes/s that the device can send to others of its slice or node, over all of its links.
    """

    flops: dict[str, float]
    memory_bytes: float
    memory_rate: float
    interconnect_rate: float


# TPUs: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e. They give the interconnect in both directions or in one:
# v5e 400 GB/s in both, v5p 4800 Gbit/s in one, v6e 800 GB/s in both; v4 has six links of 50 GB/s (arXiv 2304.01433, table 4).
# Of their 32, 16, 95 and 32 GB of memory libtpu's compiler (0.0.52) leaves to programs what stands here, by its own messages.
# float32 products are done in bfloat16 unless a higher precision is asked for; a rate of their own is not published.
_V4 = Accelerator({"bfloat16": 275e12}, 30.75 * GIB, 1.2e12, 300e9)
_V5E = Accelerator({"bfloat16": 197e12}, 15.75 * GIB, 819e9, 200e9)
_V5P = Accelerator({"bfloat16": 459e12}, 95.73 * GIB, 2.765e12, 600e9)
_V6E = Accelerator({"bfloat16": 918e12}, 31.24 * GIB, 1.638e12, 400e9)

# NVIDIA's data sheets (nvidia.com/en-us/data-center: a100, h100, h200, l4), without sparsity: those of H100, H200 and L4 give
# twice as much, with it. NVLink has half of its published rate in each direction; L4 has none, but 16 lanes of PCIe 4.
_A100 = {"bfloat16": 312e12, "float32": 156e12}
_H100 = {"bfloat16": 989e12, "float32": 494e12}

ACCELERATORS = {  # by `jax.Device.device_kind`
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": Accelerator(_A100, 40e9, 1.555e12, 300e9),
    "NVIDIA A100-SXM4-80GB": Accelerator(_A100, 80e9, 2.039e12, 300e9),
    "NVIDIA A100 80GB PCIe": Accelerator(_A100, 80e9, 1.935e12, 300e9),
    "NVIDIA H100 80GB HBM3": Accelerator(_H100, 80e9, 3.35e12, 450e9),
    "NVIDIA H100 PCIe": Accelerator({"bfloat16": 756e12, "float32": 378e12}, 80e9, 2.0e12, 300e9),
    "NVIDIA H200": Accelerator(_H100, 141e9, 4.8e12, 450e9),
    "NVIDIA L4": Accelerator({"bfloat16": 121e12, "float32": 60e12}, 24e9, 300e9, 32e9),
}


def peak_bandwidth(device_kind: str) -> float | None:
    """The peak of a device's memory in bytes/s, or None where none is known."""
    found = ACCELERATORS.get(device_kind)
    return None if found is None else found.memory_rate


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """The peak of a device in FLOP/s, or None where none is known: of a CPU, of an accelerator that is not in the table.

    Args:
      device_kind: as JAX names it.
      dtype: of the factors. Where a device has no rate for it, that of bfloat16 counts.
    """
    found = ACCELERATORS.get(device_kind)
    return None if found is None else found.flops.get(dtype, found.flops["bfloat16"])
