# SPDX-License-Identifier: Apache-2.0
"""PTX as text, and as a list of instructions."""

import re
from typing import NamedTuple


class Fault(Exception):
    """A kernel does what PTX does not allow, or gives no meaning to."""


class Address(NamedTuple):
    """`[base+offset]`, or `[base, {coordinates}]` of a tensor."""

    base: str
    offset: int
    coordinates: tuple[str, ...]


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      parts: of its name, between dots.
      operands: registers, literals and symbols as strings; lists in braces as tuples.
      predicate: the register that guards it, or None; negated: by its opposite.
    """

    text: str
    name: str
    parts: tuple[str, ...]
    operands: tuple
    predicate: str | None
    negated: bool


class Program(NamedTuple):
    """A kernel's instructions, and of each label the place of the one that follows it."""

    instructions: list[Instruction]
    labels: dict[str, int]


# What Mosaic writes as one piece of inline assembly: a wait that asks again until it is over, and a product whose
# accumulator counts where a register is not 0. Both become one instruction.
_WAIT = re.compile(
    r"LAB_WAIT:\s*(mbarrier\.try_wait\S* )\s*\w+,([^;]*;)\s*@P1 bra\.uni DONE;\s*bra\.uni\s+LAB_WAIT;\s*DONE:"
)
_PRODUCT = re.compile(r"\{ \.reg \.pred p; setp\.ne\.b32 p, (\S+), 0; (wgmma[^;]*), p, ([^;]*;) \}")
_DIRECTIVE = re.compile(r"^\s*\.(?:loc|reg|pragma|shared)\b.*\n", re.MULTILINE)


def parse(ptx: str) -> Program:
    """The program of the one kernel in `ptx`."""
    body = _DIRECTIVE.sub("", re.sub(r"//.*", "", ptx[ptx.index("\n{\n") + 3 :]))
    body = body[: body.index("\n}\n")] if "\n}\n" in body else body
    body = _PRODUCT.sub(r"\2, \1, \3", _WAIT.sub(r"\1\2", body))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, body.splitlines()):
        if not line or line in "{}":
            continue
        if label := re.fullmatch(r"(\$?\w+):", line):
            labels[label[1]] = len(instructions)
        else:
            instructions.append(_instruction(line))
    return Program(instructions, labels)


def _instruction(line: str) -> Instruction:
    guarded = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*?)\s*;", line)
    if guarded is None:
        raise NotImplementedError(f"no instruction: {line}")
    negation, predicate, name, operands = guarded.groups()
    parsed = tuple(map(_operand, split(operands)))
    return Instruction(line, name, tuple(name.split(".")), parsed, predicate, negation == "!")


def split(text: str) -> list[str]:
    """What commas separate, outside of brackets and braces."""
    depth, out = 0, [""]
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            out.append("")
        else:
            out[-1] += c
    return [part.strip() for part in out if part.strip()]


def _operand(text: str) -> str | tuple:
    if text[0] == "{":
        return tuple(split(text[1:-1]))
    if text[0] != "[":
        return text
    base, *coordinates = split(text[1:-1])
    base, _, offset = base.partition("+")
    inner = tuple(split(coordinates[0][1:-1])) if coordinates else ()
    return Address(base, int(offset or 0), inner)
