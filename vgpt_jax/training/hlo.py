"""Reading the text of a compiled program (XLA's HLO): computations, instructions, shapes, and how often a loop goes round.

Only what its cost needs is read; what the costs are is in `training.compiled_cost`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")
_PARENTHESIS = re.compile(r"[()]")

_PASSED_ON = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert", "opt-barrier")
"""What gives a whole number on as it is."""


@dataclass(frozen=True)
class Shape:
    """An array. ``space`` is where it lies: 0 is the device's main memory, others are on the chip itself."""

    dtype: str
    sizes: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Its size without what the layout pads."""
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or "0")[0])
        return math.prod(self.sizes) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line: ``name = shapes opcode(operands), attributes``; a tuple has several shapes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str

    def called(self, attribute: str) -> str | None:
        """The name of the computation that an attribute such as "calls" or "body" gives."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        return [name for name in map(self.called, ("true_computation", "false_computation")) if name]

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        return int(re.search(r"\bindex=(\d+)", self.attributes)[1])


@dataclass
class Computation:
    """Instructions by name, in order; ``root`` is the name of the one whose value it gives."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def users(self, name: str) -> Iterator[Instruction]:
        return (i for i in self.instructions.values() if name in i.operands)

    def through(self, name: str, opcodes: tuple[str, ...]) -> Instruction | None:
        """The instruction of that name, or what it passes on if it is one of ``opcodes``; None for one from elsewhere."""
        found = self.instructions.get(name)
        while found is not None and found.opcode in opcodes and found.operands:
            found = self.instructions.get(found.operands[0])
        return found


@dataclass
class Program:
    """Computations by name, the first to run, and over how many devices it is spread."""

    computations: dict[str, Computation]
    entry: Computation
    num_devices: int


def parse(text: str) -> Program:
    """Reads what ``jax.stages.Compiled.as_text`` gives."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations[head[2]] = Computation(head[2])
                entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(_COMMENT.sub("", line)):
            instruction = _instruction(found[2], found[3])
            current.instructions[instruction.name] = instruction
            if found[1]:
                current.root = instruction.name
    head = text.splitlines()[0]
    found = [re.search(rf"\b{name}=(\d+)", head) for name in ("num_partitions", "replica_count")]
    return Program(computations, entry, math.prod(int(n[1]) for n in found if n))


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(n.strip("<=")) for n in sizes.split(",") if n),
            int((re.search(r"S\((\d+)\)", layout) or (0, 0))[1]),
        )
        for dtype, sizes, layout in _SHAPE.findall(rest[:end])
    )
    opcode, rest = rest[end:].lstrip().split("(", 1)
    end = _closing("(" + rest) - 1
    inside = rest[:end]
    operands = tuple(_NAME.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(name, shapes, opcode, operands, rest[end + 1 :], inside)


def _closing(text: str) -> int:
    """Where the parenthesis that a text begins with closes."""
    depth = 0
    for found in _PARENTHESIS.finditer(text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"a parenthesis is left open: {text[:80]}")


Callers = tuple[tuple[Computation, Instruction], ...]
"""The loops that a computation is in: the outermost first, each with the computation that it is an instruction of."""


def trip_count(program: Program, computation: Computation, loop: Instruction, callers: Callers = ()) -> int | None:
    """How often a loop goes round; None where its text does not say.

    Some backends write it beside the loop. Of others it is found where, as in a loop of `jax.lax.scan`, one of the numbers that
    the loop carries goes up in equal steps while it is less than another.

    Args:
      program: all of it.
      computation: in which the loop is.
      loop: the instruction.
      callers: the loops around it.
    """
    if found := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
        return int(found[1])
    condition, inside = program.computations[loop.called("condition")], (*callers, (computation, loop))
    test = condition.instructions[condition.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (condition.through(name, _PASSED_ON) for name in test.operands)
    if counter is None or not _is_carried(condition, counter):
        return None
    last = _known(program, condition, limit, inside)
    first = _known(program, computation, _before(computation, loop, counter.index), callers)
    step = _step(program, loop, counter.index, inside)
    return None if None in (first, last, step) or step < 1 else max(0, -(-(last - first) // step))


def _is_carried(computation: Computation, instruction: Instruction) -> bool:
    """Whether it is an element of what a loop carries."""
    if instruction.opcode != "get-tuple-element":
        return False
    return computation.instructions[instruction.operands[0]].opcode == "parameter"


def _before(computation: Computation, loop: Instruction, index: int) -> Instruction | None:
    """What an element that a loop carries is when it begins."""
    start = computation.instructions[loop.operands[0]]
    return computation.through(start.operands[index], _PASSED_ON) if start.opcode == "tuple" else None


def _after(body: Computation, index: int) -> Instruction | None:
    """What a loop's body makes of an element."""
    root = body.instructions[body.root]
    return body.through(root.operands[index], _PASSED_ON) if root.opcode == "tuple" else None


def _step(program: Program, loop: Instruction, index: int, inside: Callers) -> int | None:
    """By how much a loop adds to an element each time."""
    body = program.computations[loop.called("body")]
    update = _after(body, index)
    if update is None or update.opcode != "add":
        return None
    terms = [body.through(name, _PASSED_ON) for name in update.operands]
    counters = [t for t in terms if t is not None and _is_carried(body, t) and t.index == index]
    if len(counters) != 1:
        return None
    return _known(program, body, terms[1 - terms.index(counters[0])], inside)


def _known(program: Program, computation: Computation, instruction: Instruction | None, callers: Callers) -> int | None:
    """A whole number that is known before the program runs: a constant, also one that loops carry unchanged."""
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if not callers or not _is_carried(computation, instruction):
        return None
    *outer, (caller, loop) = callers
    body, index = program.computations[loop.called("body")], instruction.index
    same = _after(body, index)
    if same is None or not _is_carried(body, same) or same.index != index:
        return None
    return _known(program, caller, _before(caller, loop, index), tuple(outer))
