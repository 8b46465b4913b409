# SPDX-License-Identifier: Apache-2.0
"""What instructions make of registers ("Integer Arithmetic", "Floating Point", "Comparison and Selection", "Logic and
Shift", "Data Movement and Conversion Instructions"): 32 lanes at a time, to the bit."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .text import Instruction

LANES = np.arange(32)

Read = Callable[[Any, Any], np.ndarray]
"""A register or a literal, as 32 numbers of a type."""

_KINDS = {"s": "i", "u": "u", "b": "u", "f": "f"}
TYPES = {f"{kind}{8 * size}": np.dtype(f"{code}{size}") for kind, code in _KINDS.items() for size in (2, 4, 8)}
TYPES["pred"] = np.dtype(bool)

_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "gt": operator.gt,
    "le": operator.le,
    "ge": operator.ge,
}
_BITWISE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, of two the even one; any NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high 16 bits of 32."""
    return words.astype(np.uint16), (words >> 16).astype(np.uint16)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """32 bits of twice 16."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def _unknown(i: Instruction) -> NotImplementedError:
    return NotImplementedError(i.name)


def _floats(read: Read, i: Instruction) -> np.ndarray:
    """float32; `ftz` would flush what no kernel here has; approximate functions are exact (`ptx`)."""
    op, *modifiers, _ = i.parts
    if set(modifiers) - {"rn", "approx", "ftz", "full", "NaN"}:
        raise _unknown(i)
    x = [read(o, np.float32) for o in i.operands[1:]]
    if op in ("fma", "rsqrt"):
        wide = [v.astype(np.float64) for v in x]
        return (wide[0] * wide[1] + wide[2] if op == "fma" else 1 / np.sqrt(wide[0])).astype(np.float32)
    if op in ("max", "min"):
        exact = (np.maximum, np.minimum) if "NaN" in modifiers else (np.fmax, np.fmin)
        return exact[op == "min"](*x)
    return {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
        "neg": operator.neg, "ex2": np.exp2,
    }[op](*x)  # fmt: skip


def _bfloat16(read: Read, i: Instruction) -> np.ndarray:
    """One, or two in a register, each rounded."""
    f = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[i.parts[0]]
    if i.parts[1:] == ("bf16",):
        return bfloat16_bits(f(*(bfloat16_values(read(o, np.uint16)) for o in i.operands[1:])))
    x, y = (map(bfloat16_values, halves(read(o, np.uint32))) for o in i.operands[1:])
    return joined(*(bfloat16_bits(f(a, b)) for a, b in zip(x, y, strict=True)))


def _arithmetic(read: Read, i: Instruction) -> np.ndarray:
    if i.parts[-1] == "f32":
        return _floats(read, i)
    if i.parts[-1] in ("bf16", "bf16x2"):
        return _bfloat16(read, i)
    if len(i.parts) != 2:
        raise _unknown(i)
    f = {"add": np.add, "sub": np.subtract, "max": np.maximum, "min": np.minimum}[i.parts[0]]
    return f(*(read(o, TYPES[i.parts[1]]) for o in i.operands[1:]))


def _multiply(read: Read, i: Instruction) -> np.ndarray:
    if i.parts[-1] in ("f32", "bf16", "bf16x2"):
        return _arithmetic(read, i)
    _, how, name = i.parts
    kind = TYPES[name]
    x, y = (read(o, kind) for o in i.operands[1:3])
    if how == "lo":
        return x * y + read(i.operands[3], kind) if i.parts[0] == "mad" else x * y
    if how == "wide" and i.parts[0] == "mul":
        wide = TYPES[f"{name[0]}{2 * int(name[1:])}"]
        return x.astype(wide) * y.astype(wide)
    if how == "hi" and i.parts[0] == "mul":
        bits = 8 * kind.itemsize
        return np.array([int(a) * int(b) >> bits & (1 << bits) - 1 for a, b in zip(x, y, strict=True)]).astype(
            f"u{bits // 8}"
        )
    raise _unknown(i)


def _shift(read: Read, i: Instruction) -> np.ndarray:
    """Amounts beyond the width count as the width."""
    if i.name == "shf.l.wrap.b32":
        low, high, by = (read(o, np.uint32).astype(np.uint64) for o in i.operands[1:])
        return ((((high << 32) | low) << (by & 31)) >> 32).astype(np.uint32)
    op, name = i.parts
    x, by = read(i.operands[1], TYPES[name]), read(i.operands[2], np.uint32)
    bits = 8 * x.dtype.itemsize
    most = np.minimum(by, bits - 1).astype(x.dtype)
    if op == "shr" and name[0] == "s":
        return x >> most
    return np.where(by >= bits, 0, x << most if op == "shl" else x >> most).astype(x.dtype)


def _field(read: Read, i: Instruction) -> np.ndarray:
    """`bfe`: a field of bits, its sign spread."""
    kind = TYPES[i.parts[1]]
    x, at, count = (read(o, t) for o, t in zip(i.operands[1:], (kind, np.uint32, np.uint32), strict=True))
    if (at != at[0]).any() or (count != count[0]).any() or at[0] + count[0] > 8 * kind.itemsize or not count[0]:
        raise _unknown(i)
    above = kind.type(8 * kind.itemsize - int(at[0]) - int(count[0]))
    return (x << above) >> kind.type(8 * kind.itemsize - int(count[0]))


def _logic(read: Read, i: Instruction) -> np.ndarray:
    x, y = (read(o, TYPES[i.parts[1]]) for o in i.operands[1:])
    return _BITWISE[i.parts[0]](x, y)


def _lop3(read: Read, i: Instruction) -> np.ndarray:
    """Any function of three bits, by its table."""
    x, y, z = (read(o, np.uint32) for o in i.operands[1:4])
    table, out = int(i.operands[4], 0), np.zeros(32, np.uint32)
    for k in range(8):
        if table >> k & 1:
            out |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
    return out


def _permute(read: Read, i: Instruction) -> np.ndarray:
    """`prmt`: four of eight bytes, or their signs."""
    low, high, choice = (read(o, np.uint32).astype(np.uint64) for o in i.operands[1:])
    both, out = (high << 32) | low, np.zeros(32, np.uint64)
    for k in range(4):
        chosen = choice >> 4 * k & 15
        byte = both >> (chosen & 7) * 8 & 255
        out |= np.where(chosen & 8, (byte >> 7) * 255, byte) << 8 * k
    return out.astype(np.uint32)


def _compare(read: Read, i: Instruction) -> np.ndarray:
    _, comparison, *with_, name = i.parts
    out = _COMPARISONS[comparison](*(read(o, TYPES[name]) for o in i.operands[1:3]))
    return _BITWISE[with_[0]](out, read(i.operands[3], np.bool_)) if with_ else out


def _select(read: Read, i: Instruction) -> np.ndarray:
    kind = TYPES[i.parts[1]]
    return np.where(read(i.operands[3], np.bool_), read(i.operands[1], kind), read(i.operands[2], kind))


def _move(read: Read, i: Instruction) -> np.ndarray:
    if isinstance(i.operands[1], tuple):
        return joined(*(read(o, np.uint16) for o in i.operands[1]))
    return read(i.operands[1], TYPES[i.parts[1]])


def _convert(read: Read, i: Instruction) -> np.ndarray:
    *_, to, of = i.parts
    source = i.operands[1]
    if i.name == "cvt.rn.bf16x2.f32":
        return joined(*(bfloat16_bits(read(o, np.float32)) for o in i.operands[:0:-1]))
    if i.name == "cvt.rn.bf16.f32":
        return bfloat16_bits(read(source, np.float32))
    if i.name == "cvt.f32.bf16":
        return bfloat16_values(read(source, np.uint16))
    if of == "s8":  # the low byte of a wider register
        return read(source, np.uint16).astype(np.uint8).view(np.int8).astype(TYPES[to])
    rounds = to == "f32" and of in ("u32", "s32") and i.parts[1] == "rn"
    widens = i.name == "cvt.f32.f16"
    between_integers = len(i.parts) == 3 and to[0] in "us" and of[0] in "us"
    if not (rounds or widens or between_integers):
        raise _unknown(i)
    return read(source, TYPES[of]).astype(TYPES[to])


def _shuffle(read: Read, i: Instruction) -> np.ndarray:
    """`shfl.sync` by all lanes of a warp, among all of them."""
    if i.parts[1] != "sync" or i.parts[-1] != "b32" or i.operands[3:] != ("31", "-1"):
        raise _unknown(i)
    x, by = (read(o, np.uint32) for o in i.operands[1:3])
    return x[LANES ^ by] if i.parts[2] == "bfly" else x[{"idx": by}[i.parts[2]]]


def _same(read: Read, i: Instruction) -> np.ndarray:
    """`cvta`: generic addresses are those of global memory here; in shared memory they begin at `shared.BASE`."""
    return read(i.operands[1], np.uint64)


OPERATIONS: dict[str, Callable[[Read, Instruction], np.ndarray]] = {
    **dict.fromkeys(("add", "sub", "max", "min"), _arithmetic),
    **dict.fromkeys(("fma", "neg", "div", "ex2", "rsqrt"), _floats),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys(("shl", "shr", "shf"), _shift),
    **dict.fromkeys(("and", "or", "xor"), _logic),
    "bfe": _field,
    "lop3": _lop3,
    "prmt": _permute,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": _same,
    "shfl": _shuffle,
}
"""By the first part of an instruction's name: what its first operand becomes."""
