"""What a device can do, by its data sheet and measured, and what a compiled program does with it."""

import gzip
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from vgpt_jax.training.trace import check_profiler


def measured_bandwidths(rows: int = 8192) -> dict[str, float]:
    """Bytes/s at which XLA reads a matrix of ``rows`` by ``rows`` float32 (256 MiB), in two programs with all cores, by name."""
    matrix, vector = jnp.ones((rows, rows)), jnp.ones((rows,))
    programs = {
        "a sum": lambda matrix, vector: jnp.sum(matrix),
        "a matrix-vector product": lambda matrix, vector: vector @ matrix,
    }
    return {name: matrix.nbytes / least_seconds(program, matrix, vector) for name, program in programs.items()}


def measured_flops(dtype: str, size: int = 2048) -> float:
    """FLOP/s of XLA's product of two square matrices."""
    matrix = jnp.ones((size, size), dtype)
    return 2 * size**3 / least_seconds(jnp.matmul, matrix, matrix)


def least_seconds(function: Callable, *arguments: jax.Array, count: int = 10) -> float:
    """The least time of some runs of a function, compiled: what the device can do when nothing is in its way."""
    program = jax.jit(function).lower(*arguments).compile()
    return min(seconds_of(lambda: jax.block_until_ready(program(*arguments)), count))


def seconds_of(step: Callable[[], object], count: int) -> list[float]:
    """The time of each of ``count`` steps."""
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return seconds


def print_parts(what: str, parts: dict[str, float], most: int = 8) -> None:
    """Prints the greatest parts of a step, in milliseconds."""
    print(f"\n{what}, where the time goes:")
    for name, seconds in Counter(parts).most_common(most):
        print(f"{1000 * seconds:9.1f} ms  {name}")


def operations_of(program: jax.stages.Compiled) -> float:
    """Floating-point operations of one run of a compiled program, as XLA counts them."""
    analysis = program.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def time_by_operation(step: Callable[[], object], program: jax.stages.Compiled, num_steps: int = 3) -> dict[str, float]:
    """Seconds a step of each kind of operation, on average, from JAX's profiler.

    Args:
      step: runs the program once and waits for it.
      program: what is run; its text says what a fusion is made of.
      num_steps: how many are watched.

    Raises:
      UserError: it cannot be, as `check_profiler`.
    """
    check_profiler()
    kinds = _kinds(program.as_text())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(num_steps):
                step()
        trace = next(Path(directory).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    seconds: Counter = Counter()
    for event in events:
        kind = kinds.get(event["name"]) if event.get("ph") == "X" else None
        if kind:
            seconds[kind] += event["dur"] / 1e6 / num_steps
    return dict(seconds)


def _kinds(text: str) -> dict[str, str]:
    """Instruction name -> kind, for the instructions of a program's text that take time by themselves."""
    bodies: dict[str, str] = {}
    for name, body in re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        bodies[name] = body
    kinds = {}
    for name, operation, rest in re.findall(r"%?([\w.\-]+) = \S+ ([\w\-]+)\(([^\n]*)", text):
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)
        body = bodies.get(called.group(1), "") if called else ""
        if operation == "convolution" or " convolution(" in body:
            whole = f"{operation}({rest}" if operation == "convolution" else body
            window = re.search(r"window=\{size=(\d+)x(\d+)", whole)
            wide = window and max(map(int, window.groups())) > 5
            kinds[name] = (
                "convolutions, gradient of kernels" if wide else "convolutions, forward and gradient of images"
            )
        elif operation == "dot" or " dot(" in body:
            kinds[name] = "matrix products"
        elif "transpose" in name or "copy" in name:
            kinds[name] = "transposes and copies"
        elif operation == "fusion" or operation in ("reduce", "custom-call"):
            kinds[name] = "reductions" if "reduce" in name or " reduce(" in body else "elementwise"
    return kinds
