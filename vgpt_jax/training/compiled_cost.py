"""What one run of a compiled program costs a device: arithmetic, traffic with its memory, messages to other devices, and memory.

Everything is counted on the text of the program that the device runs. XLA's own analysis counts the body of a loop once; here it
counts as often as the loop goes round, which matters where tokens are sampled or gradients accumulated. Of the branches of a
conditional the one counts that does the least.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np

from vgpt_jax.hardware import Accelerator
from vgpt_jax.training.hlo import Callers, Computation, Instruction, Program, Shape, parse, trip_count

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "send")
"""Kinds of messages; "send" is one to a chip of another slice, which does not go over the interconnect."""

_SILENT = {  # neither read nor write memory of their own: names for what is there, and what is counted by itself
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "iota",
}  # fmt: skip


_SLICES = ("dynamic-slice", "gather", "slice")


@dataclass(frozen=True)
class Collective:
    """Messages of one kind: how many are sent in a run, and the bytes that a device sends, over rings of devices."""

    count: int
    bytes: float


@dataclass(frozen=True)
class Cost:
    """Of one run of a program, for each device.

    Attributes:
      flops: of matrix products and convolutions, a multiplication and an addition being two; what pads is not counted.
      bytes: read from and written to the device's main memory.
      collectives: kind -> messages; only kinds that there are.
      unknown_loops: loops of which it is not known how often they go round; they count once.
    """

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    unknown_loops: int

    @property
    def interconnect_bytes(self) -> float:
        """Of all messages but those to other slices."""
        return sum(messages.bytes for kind, messages in self.collectives.items() if kind != "send")

    def least_seconds(self, accelerator: Accelerator, dtype: str = "bfloat16") -> dict[str, float]:
        """What the arithmetic, the memory and the interconnect would each take at their peaks, were they all that there is. The
        greatest is a bound of the run's time: nothing is faster, and a real run is slower."""
        return {
            "arithmetic": self.flops / accelerator.flops.get(dtype, accelerator.flops["bfloat16"]),
            "memory": self.bytes / accelerator.memory_rate,
            "interconnect": self.interconnect_bytes / accelerator.interconnect_rate,
        }


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's main memory while a program runs.

    Attributes:
      arguments, outputs: as laid out, padding included.
      aliased: of the outputs, what is written over donated arguments.
      temporaries: activations above all.
      code: of the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program, by XLA's own account."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def cost_of(compiled: jax.stages.Compiled | str) -> Cost:
    """The cost of a compiled program, or of its text.

    Raises:
      jax.errors.JaxRuntimeError: a program's text cannot be read, as it may be of a compiler that is newer than jaxlib.
    """
    program = parse(compiled if isinstance(compiled, str) else compiled.as_text())
    count = _Count(program)
    count.run(program.entry, 1, ())
    collectives = {k: Collective(count.messages[k], count.sent[k]) for k in COLLECTIVES if count.messages[k]}
    return Cost(count.flops, count.bytes, collectives, count.unknown_loops)


class _Count:
    """Sums over the instructions of a program that are run."""

    def __init__(self, program: Program):
        self.program = program
        self.flops, self.bytes, self.unknown_loops = 0.0, 0.0, 0
        self.messages, self.sent = Counter(), Counter()
        # A TPU's asynchronous message is in the fusion that starts it, in those that it overlaps, and in the one that ends it.
        self.started = {
            _channel(instruction)
            for computation in program.computations.values()
            if _is_start(computation)
            for instruction in computation.instructions.values()
        } - {None}

    def run(self, computation: Computation, times: int, callers: Callers, fused: bool = False) -> None:
        """Adds a computation that is run so many times. In a fusion what lies between instructions never reaches memory."""
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            self.flops += times * flops_of(instruction, computation)
            self._send(instruction, computation, times, fused)
            if not fused and opcode not in _SILENT and not opcode.endswith("-start"):
                self.bytes += times * self._traffic(instruction, computation)
            if opcode == "while":
                trips = trip_count(self.program, computation, instruction, callers)
                self.unknown_loops += trips is None
                inner = times * (1 if trips is None else trips)
                body = self.program.computations[instruction.called("body")]
                self.run(body, inner, (*callers, (computation, instruction)))
            elif opcode == "conditional":
                self._choose(instruction, times, callers)
            else:
                name = instruction.called("to_apply" if opcode == "call" else "calls")
                if name and opcode in ("call", "fusion", "async-start"):
                    self.run(self.program.computations[name], times, callers, fused or opcode == "fusion")

    def _choose(self, instruction: Instruction, times: int, callers: Callers) -> None:
        """Adds the branch of a conditional that does the least: what is rare in a training is there taken as not done."""
        branches = [_Count(self.program) for _ in instruction.branches]
        for count, name in zip(branches, instruction.branches, strict=True):
            count.run(self.program.computations[name], times, callers)
        least = min(branches, key=lambda count: (count.flops, count.bytes))
        self.flops, self.bytes = self.flops + least.flops, self.bytes + least.bytes
        self.unknown_loops += least.unknown_loops
        self.messages, self.sent = self.messages + least.messages, self.sent + least.sent

    def _send(self, instruction: Instruction, computation: Computation, times: int, fused: bool) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        if _channel(instruction) in self.started and not _is_start(computation):
            return
        given = sum(shape.bytes for name in instruction.operands for shape in computation.instructions[name].shapes)
        group = group_size(instruction.attributes, self.program.num_devices)
        if kind == "all-reduce" and fused and _is_scatter(instruction, computation):
            kind = "reduce-scatter"
        others = (group - 1) / group
        share = {"all-reduce": 2 * others, "all-gather": group - 1, "collective-permute": 1, "send": 1}.get(
            kind, others
        )
        self.messages[kind] += times
        self.sent[kind] += times * given * share

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that an instruction outside of fusions reads from and writes to main memory."""
        shapes = [computation.instructions[name].shapes for name in instruction.operands]
        if instruction.opcode == "fusion":
            inner = self.program.computations[instruction.called("calls")]
            read = sum(
                min(sum(map(_main, shapes[i])), self._read(inner, name))
                for name, i in _parameters(inner)
                if any(map(_main, shapes[i]))
            )
            return read + self._written(inner, instruction.shapes)
        written = sum(map(_main, instruction.shapes))
        if instruction.opcode.endswith("-done"):  # what was started gives its operands too, besides its result
            instruction = computation.instructions[instruction.operands[0]]
            shapes = [computation.instructions[name].shapes for name in instruction.operands]
            result = instruction.shapes[1:2]
        else:
            result = instruction.shapes
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in _SLICES:
            return written + (sum(shape.bytes for shape in result) if any(map(_main, shapes[0])) else 0)
        if opcode in ("dynamic-update-slice", "scatter"):  # in place
            return 2 * sum(map(_main, shapes[1 if opcode == "dynamic-update-slice" else -1]))
        return written + sum(_main(shape) for several in shapes for shape in several)

    def _read(self, computation: Computation, name: str) -> float:
        """Bytes that a fusion reads of its parameter: where every use takes a slice, the slices."""
        total = 0.0
        for user in computation.users(name):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "fusion":
                inner = self.program.computations[user.called("calls")]
                mine = [p for p, i in _parameters(inner) if user.operands[i] == name]
                total += sum(self._read(inner, p) for p in mine)
            elif user.opcode == "bitcast" and user.name != computation.root:
                total += self._read(computation, user.name)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # written in place
            elif user.opcode not in ("tuple", "bitcast") and not _passes_message(user):
                return math.inf
        return total

    def _written(self, computation: Computation, shapes: tuple[Shape, ...]) -> float:
        """Bytes that a fusion writes: of an update in place, the update; of what it only hands on, none."""
        root = computation.instructions[computation.root]
        if "AsyncCollective" in root.attributes:  # gives the operand, the result and signals; ended, the result again
            return sum(map(_main, shapes[1:2]))
        names = root.operands if root.opcode == "tuple" else [root.name] * len(shapes)
        total = 0.0
        for name, shape in zip(names, shapes, strict=True):
            found = computation.through(name, ("bitcast",))
            if found.opcode == "dynamic-update-slice" and _main(shape):
                total += sum(part.bytes for part in computation.instructions[found.operands[1]].shapes)
            elif found.opcode != "parameter":
                total += _main(shape)
        return total


def _main(shape: Shape) -> float:
    """Its bytes, if it lies in main memory."""
    return 0.0 if shape.space else shape.bytes


def _parameters(computation: Computation) -> list[tuple[str, int]]:
    """Names and numbers."""
    return [(i.name, int(i.literal)) for i in computation.instructions.values() if i.opcode == "parameter"]


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found and found[1]


def _is_start(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.attributes for i in computation.instructions.values())


def _passes_message(instruction: Instruction) -> bool:
    return instruction.opcode in COLLECTIVES or "AsyncCollective" in instruction.attributes


def _is_scatter(instruction: Instruction, computation: Computation) -> bool:
    """Whether only this device's slice of a sum is used: how a TPU writes a reduce-scatter."""
    users = list(computation.users(instruction.name))
    return len(users) == 1 and users[0].opcode == "dynamic-slice"


def group_size(attributes: str, num_devices: int) -> int:
    """How many devices a message is among, by its "replica_groups", of which there are three ways to write them."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return num_devices


def flops_of(instruction: Instruction, computation: Computation) -> float:
    """The arithmetic of a matrix product or a convolution, also where it is a call of a GPU's library; of all else, none."""
    opcode, attributes = instruction.opcode, instruction.attributes
    of = lambda name: computation.instructions[name].shapes[0].sizes  # noqa: E731
    if opcode == "dot" or (opcode == "custom-call" and "__cublas$" in attributes):
        dims = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', attributes)
        lhs = of(instruction.operands[0])
        contracted = [lhs[int(i)] for i in re.findall(r"\d+", dims[1])] if dims else []
        return 2 * math.prod(instruction.shapes[0].sizes) * math.prod(contracted)
    library = None
    if opcode == "custom-call":
        library = re.search(r'"__cudnn\$conv(Forward|BackwardInput|BackwardFilter|BiasActivationForward)', attributes)
    if opcode == "convolution" or library:
        a, b, result = *map(of, instruction.operands[:2]), instruction.shapes[0].sizes
        # A gradient's call is labelled like the convolution that it is the gradient of.
        places = {"BackwardInput": (result, b, a), "BackwardFilter": (a, result, b)}
        return _convolution(attributes, *places.get(library and library[1], (a, b, result)))
    return 0.0


def _convolution(attributes: str, inputs: tuple, kernel: tuple, outputs: tuple) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ("", ""))[1]))
    rank = len(labels[1]) - 2
    each = lambda name, default: [*window[name].split("x")] if name in window else [default] * rank  # noqa: E731
    valid = 1
    for i in range(rank):
        valid *= _valid_places(
            inputs[labels[1].index(str(i))],
            kernel[labels[2].index(str(i))],
            outputs[labels[3].index(str(i))],
            int(each("stride", "1")[i]),
            int(each("pad", "0_0")[i].split("_")[0]),
            int(each("lhs_dilate", "1")[i]),
            int(each("rhs_dilate", "1")[i]),
        )
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = inputs[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * kernel[labels[2].index("i")] * kernel[labels[2].index("o")] * valid


@lru_cache(maxsize=1024)
def _valid_places(size: int, window: int, outputs: int, stride: int, pad: int, dilation: int, spread: int) -> int:
    """Pairs of a place of the output and one of the window that meet a value, and not padding, along one dimension."""
    at = np.arange(outputs)[:, None] * stride + np.arange(window) * spread - pad
    return int(np.sum((at >= 0) & (at < (size - 1) * dilation + 1) & (at % dilation == 0)))
