"""How the C library treats the memory that XLA's CPU backend frees, and Python its own."""

import ctypes
import gc
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for the whole process; elsewhere nothing happens.

    On CPU every training step allocates hundreds of megabytes for temporaries. glibc gets large blocks from the system and
    gives them back at once, so every step touches fresh pages: a quarter of a step's processor time. Kept in one arena, the
    pages of the step before are used again. The process holds what it needed at most. To be called before JAX starts its
    backend, whose threads would have arenas of their own.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def collect_garbage_rarely() -> None:
    """Lets Python look for garbage after 200,000 new objects, not after 700.

    Tracing makes millions of objects and hardly any garbage, yet a third of its time is the collector's: with this the programs
    of configs/imagenet.py are traced in 6.6 s, without in 10.7 (one core of an AMD EPYC). Steps leave no cycles behind.
    """
    gc.set_threshold(200_000, 20, 20)


def accelerator_is_installed() -> bool:
    """Whether JAX has a backend beside the CPU's to start: a plugin, or libtpu and a TPU. Starts none."""
    return bool(entry_points(group="jax_plugins")) or (find_spec("libtpu") is not None and tpu_is_here())


def tpu_is_here() -> bool:
    """Whether the machine has a TPU. libtpu alone says nothing: it compiles for TPUs elsewhere, too."""
    return any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
