"""Compiles a program for devices that need not be here, and says what it needs of each: memory, work, the least time for it."""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vgpt_jax.files import written_whole
from vgpt_jax.hardware import ACCELERATORS
from vgpt_jax.training.compiled_cost import Cost, Memory, cost_of, memory_of


@dataclasses.dataclass(frozen=True)
class Job:
    """A program that is to be compiled.

    Attributes:
      name: what it is.
      pictures: of a run, over all chips.
      parts: of a chip's memory, what the arguments take, by name, in bytes.
      lower: makes it.
    """

    name: str
    pictures: int
    parts: dict[str, int]
    lower: Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program needs of each chip.

    Attributes:
      program: what it is.
      chip: as JAX names it.
      mesh: axis -> chips.
      pictures: of a run, over all chips.
      parts: of a chip's memory, what the arguments take, by name, in bytes.
      activations: bytes of temporaries; None where the program does not fit.
      needed: bytes of all memory while it runs.
      available: bytes that a chip has for it.
      cost: of a run; None where the program does not fit.
      seconds: what each of the resources would take by itself at its best.
      compile_seconds: of this machine.
    """

    program: str
    chip: str
    mesh: dict[str, int]
    pictures: int
    parts: dict[str, int]
    activations: int | None
    needed: float
    available: float
    cost: Cost | None
    seconds: dict[str, float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.cost is not None

    @property
    def bound(self) -> float:
        """Seconds that a run takes at least."""
        return max(self.seconds.values())

    @property
    def share_of_peak(self) -> float:
        """Of the chip's arithmetic, that a run of that time would use."""
        return self.seconds["arithmetic"] / self.bound

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        found = dataclasses.asdict(self) | {"fits": self.fits}
        if self.fits:
            found |= {"bound": self.bound, "pictures_per_second": self.pictures / self.bound}
            found["share_of_peak"] = self.share_of_peak
        return found


def compiled_report(job: Job, mesh: Mesh, dump: Path | None = None) -> Report:
    """Compiles a program for the devices of a mesh, and reads off what it needs.

    Args:
      job: the program.
      mesh: that it is for.
      dump: folder for its text, ``NAME.txt``.
    """
    chip = mesh.devices.flat[0].device_kind
    available, begun = ACCELERATORS[chip].memory_bytes, time.monotonic()
    activations, cost, seconds = None, None, {}
    try:
        memory, text = compiled_program(job)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        if needed is None:
            raise
    else:
        cost = cost_of(text)
        activations, needed, seconds = memory.temporaries, memory.total, cost.least_seconds(ACCELERATORS[chip])
        if dump is not None:
            with written_whole(dump / f"{job.name.replace(' ', '_')}.txt") as unfinished:
                unfinished.write_text(text)
    return Report(
        program=job.name,
        chip=chip,
        mesh=dict(mesh.shape),
        pictures=job.pictures,
        parts={name: size for name, size in job.parts.items() if size},
        activations=activations,
        needed=needed,
        available=available,
        cost=cost,
        seconds=seconds,
        compile_seconds=time.monotonic() - begun,
    )


def compiled_program(job: Job) -> tuple[Memory, str]:
    """What a program takes of a device's memory, and its text.

    The text is what the compiler itself writes: of a libtpu that is newer than jaxlib, ``as_text`` cannot read every program.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = job.lower().compile(compiler_options={"xla_dump_to": folder})
        (text,) = Path(folder).glob("*.after_optimizations.txt")
        return memory_of(compiled), text.read_text()


def needed_memory(message: str) -> float | None:
    """Bytes that a program would need, by what the compiler says of one that does not fit; None where it says something else."""
    found = re.search(r"RESOURCE_EXHAUSTED.*?memory required[^(]*\(([\d.]+)([KMGT])\)", message, re.DOTALL)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else None


def advice(report: Report) -> str:
    """How much a program is over, and what to change."""
    state = sum(size for name, size in report.parts.items() if name != "batch")
    split = "mesh.fsdp (more chips for a copy of the state)"
    section = f"{report.program.split()[0]}_training"
    smaller = [f"{section}.batch_size", f"{section}.accumulate", f"{section}.remat"]
    if report.program == "sampler":
        smaller = ["--sample with fewer pictures"]
    changes = [split, *smaller] if state > report.available / 2 else [*smaller, split]
    over = report.needed - report.available
    return (
        f"{report.program} needs {in_units(over)} more than the {in_units(report.available)} of a {report.chip} "
        f"({in_units(state)} of it for what is kept between steps): change {', '.join(changes)}"
    )


def table(report: Report) -> str:
    """A report to be read."""
    chips = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    lines = [f"{report.program}: {report.pictures} pictures on {chips} chips ({report.chip})"]

    def row(name: str, *cells: str) -> None:
        lines.append(f"  {name:22}{''.join(f'{cell:>14}' for cell in cells)}".rstrip())

    row("memory of a chip")
    for name, size in report.parts.items():
        row(f"  {name}", in_units(size))
    if not report.fits:
        row("  needed in all", in_units(report.needed), f"of {in_units(report.available)}")
        return "\n".join(lines)
    row("  activations", in_units(report.activations))
    row("  needed in all", in_units(report.needed), f"of {in_units(report.available)}")
    cost, times = report.cost, {name: f"{1000 * seconds:.2f} ms" for name, seconds in report.seconds.items()}
    row("work of a chip", "", "at best")
    row("  arithmetic", f"{cost.flops / 1e9:.1f} GFLOP", times["arithmetic"])
    row("  memory", in_units(cost.bytes), times["memory"])
    row("  interconnect", in_units(cost.interconnect_bytes), times["interconnect"])
    for kind, messages in cost.collectives.items():
        row(f"    {kind}", in_units(messages.bytes), f"in {messages.count}")
    if cost.unknown_loops:
        row("  loops counted once", str(cost.unknown_loops))
    slowest = max(report.seconds, key=report.seconds.get)
    lines.append(
        f"  bound, by {slowest}: {1000 * report.bound:.2f} ms, {report.pictures / report.bound:.0f} pictures/s, "
        f"{report.share_of_peak:.0%} of peak"
    )
    return "\n".join(lines)


def in_units(count: float) -> str:
    """Bytes to be read."""
    unit = min(3, int(math.log2(max(count, 1)) // 10))
    return f"{count / 1024**unit:.{min(unit, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
