# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program and the kernels that it starts, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
MOSAIC = "mosaic_gpu_v2"
"""The custom call that a kernel of `pallas_kernels` is."""
_BITS = {"pred": 8, "token": 0, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation|branch_computations|called_computations"
    r"|async_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTROL = ("while", "conditional", "call")
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "opt-barrier", "partition-id")
"""Instructions for which nothing runs."""
_LAYER = re.compile(r"\blayers\.\d+")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class CompiledCollective:
    """One array that devices exchange. An instruction that combines several arrays is several of these.

    Attributes:
      kind: one of `KINDS`; the asynchronous forms count as what they start.
      devices: in each group; None where the text leaves it to the run (all of them).
      groups: the devices of each group; empty where all are one group.
      nbytes: of the whole array: the result's, of a reduce-scatter the operand's.
      count: times in a step, by the known trip counts of the loops around it.
      bounded: False if a loop around it has no known trip count; `count` then counts it once.
      where: the operation's name in the traced program.
    """

    kind: str
    devices: int | None
    groups: tuple[tuple[int, ...], ...]
    nbytes: int
    count: int
    bounded: bool
    where: str


@dataclass(frozen=True)
class CompiledKernel:
    """Something that the device is told to run: a fusion, a call of a library or of a kernel of ours, a copy, a sort.

    Attributes:
      kind: its opcode, or the target of a custom call.
      count: times in a step; in a loop of unknown length, of one turn. Of branches, all are counted.
      where: the operation's name in the traced program.
    """

    kind: str
    count: int
    where: str


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    shape: str
    rest: str

    @property
    def kind(self) -> str | None:
        kind = self.opcode.removesuffix("-start")
        return kind if kind in KINDS else None

    def called(self) -> Iterator[tuple[str, str]]:
        for match in _CALLED.finditer(self.rest):
            for name in match[2].strip("{}").split(","):
                yield match[1], name.strip().lstrip("%")


def read_collectives(text: str) -> list[CompiledCollective]:
    """Every collective that the entry computation reaches, in the order of the text.

    Args:
      text: of one module, as `compiled.as_text()` gives it.

    Raises:
      ValueError: a collective's shape or groups are in no form that is known here.
    """
    computations, entry = _computations(text)
    found: list[CompiledCollective] = []
    _walk(computations, entry, 1, True, found)
    return found


def read_kernels(text: str) -> list[CompiledKernel]:
    """Everything that the entry computation starts, in the order of the text, as `read_collectives`."""
    computations, entry = _computations(text)
    found: list[CompiledKernel] = []
    _walk_kernels(computations, entry, 1, found)
    return found


def _walk_kernels(
    computations: dict[str, list[_Instruction]],
    name: str,
    times: int,
    found: list[CompiledKernel],
    layer: str | None = None,
) -> None:
    """Adds what a computation starts; `layer` is that of the branch or loop it is, if it is one of a layer's: layers
    whose branches are alike share them, and so the names in them."""
    for instruction in computations.get(name, []):
        named = _OP_NAME.search(instruction.rest)
        where = named[1] if named else ""
        if layer is not None:
            where = _LAYER.sub(layer, where)
        if instruction.opcode in _CONTROL:
            trips, own = _TRIPS.search(instruction.rest), _LAYER.search(where)
            turns = int(trips[1]) if trips and instruction.opcode == "while" else 1
            for _, called in instruction.called():
                _walk_kernels(computations, called, times * turns, found, own[0] if own else layer)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            target = _TARGET.search(instruction.rest)
            found.append(CompiledKernel(target[1] if target else instruction.opcode, times, where))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, those that are collectives or call others; and the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith("HloModule") and (head := _COMPUTATION.match(line)):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            shape, rest = _split_shape(found[2])
            opcode = _OPCODE.match(rest)
            if opcode is not None:
                current.append(_Instruction(opcode[1], shape, rest))
    if entry is None:
        raise ValueError("the HLO text has no entry computation")
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """`(f32[8], f32[2]) all-reduce(...)` into the shape and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"a shape does not end: {text[:80]}")


def _walk(
    computations: dict[str, list[_Instruction]], name: str, times: int, bounded: bool, found: list[CompiledCollective]
) -> None:
    for instruction in computations.get(name, []):
        if instruction.kind is not None:
            found += [replace(c, count=times, bounded=bounded) for c in _collectives(instruction)]
            continue
        trips = _TRIPS.search(instruction.rest) if instruction.opcode == "while" else None
        for attribute, called in instruction.called():
            loops = attribute == "body"
            inner = times * int(trips[1]) if loops and trips else times
            _walk(computations, called, inner, bounded and (not loops or trips is not None), found)


def _collectives(instruction: _Instruction) -> Iterator[CompiledCollective]:
    kind, rest = instruction.kind or "", instruction.rest
    groups = _groups(rest)
    devices = len(groups[0]) if groups else None
    name = _OP_NAME.search(rest)
    for nbytes in _sizes(instruction):
        whole = nbytes * (devices or 1) if kind == "reduce-scatter" else nbytes
        yield CompiledCollective(kind, devices, groups, whole, 1, True, name[1] if name else "")


def _sizes(instruction: _Instruction) -> list[int]:
    """Bytes of each array of the result."""
    shape = instruction.shape
    parts = _tuple_parts(shape) if shape.startswith("(") else [shape]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        parts = _tuple_parts(parts[1]) if parts[1].startswith("(") else [parts[1]]  # (operands, results, ...)
    return [_nbytes(part) for part in parts]


def _tuple_parts(shape: str) -> list[str]:
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(re.sub(r"/\*.*?\*/", "", shape[begin:i]).strip())
            begin = i + 1
    return parts


def _nbytes(shape: str) -> int:
    match = _ARRAY.match(shape)
    if match is None:
        raise ValueError(f"an array's shape is not understood: {shape}")
    digits = re.match(r"[a-z]+(\d+)", match[1])
    if match[1] not in _BITS and digits is None:
        raise ValueError(f"a number type is not understood: {match[1]}")
    bits = _BITS[match[1]] if match[1] in _BITS else int(digits[1])  # type: ignore[index]
    return math.prod(int(size.lstrip("<=")) for size in match[2].split(",") if size) * bits // 8


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices, in either of the forms that XLA writes; of a permutation, its pairs."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1]))
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota is None:
        raise ValueError(f"groups of devices are not understood: {rest[:200]}")
    count, size = map(int, iota[1].split(","))
    dimensions = [int(part) for part in iota[2].split(",")]
    order = [int(part) for part in iota[3].split(",")] if iota[3] else list(range(len(dimensions)))
    numbers = _iota(dimensions, order)
    return tuple(tuple(numbers[i * size : (i + 1) * size]) for i in range(count))


def _iota(dimensions: list[int], order: list[int]) -> list[int]:
    """The numbers 0, 1, ... of an array of `dimensions`, read with its axes in `order`."""
    strides = [math.prod(dimensions[i + 1 :]) for i in range(len(dimensions))]
    numbers = [0]
    for axis in order:
        numbers = [n + i * strides[axis] for n in numbers for i in range(dimensions[axis])]
    return numbers
