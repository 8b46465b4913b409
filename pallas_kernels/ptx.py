# SPDX-License-Identifier: Apache-2.0
"""Unpacking of record planes in registers: MLIR and PTX for Hopper, two bfloat16 numbers at a time.

`pallas_kernels.unpack` says the same in `jax.numpy`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.formats import IQ4_VALUES, Format
from pallas_kernels.mosaic import ACCUMULATOR, BY_ROW, plane_layout, spread

# Two bfloat16 of 128: a field of at most 7 bits or-ed into them makes 128 + field, exactly.
_MAGIC = 0x43004300


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _const(value: int) -> Any:
    return mgpu.c(value - (1 << 32) if value >= 1 << 31 else value, _i32())


def _asm(text: str, *operands: Any) -> Any:
    return llvm.inline_asm(_i32(), list(operands), text, "=r" + ",r" * len(operands))


def _shift_right(word: Any, bits: int) -> Any:
    """Logical; to the left where `bits` is negative."""
    if bits == 0:
        return word
    return arith.shrui(word, _const(bits)) if bits > 0 else arith.shli(word, _const(-bits))


def _merge(word: Any, mask: int, base: Any) -> Any:
    """(word & mask) | base."""
    return _asm("lop3.b32 $0, $1, $2, $3, 0xEA;", word, _const(mask), base)


def _subtract(a: Any, b: Any) -> Any:
    return _asm("sub.rn.bf16x2 $0, $1, $2;", a, b)


def _mask(word: Any, bits: int) -> Any:
    return arith.andi(word, _const(bits))


def _permute(a: Any, b: Any, selector: Any) -> Any:
    """Four of the eight bytes of a and b, chosen by the low three bits of the selector's nibbles."""
    return _asm("prmt.b32 $0, $1, $2, $3;", a, b, selector)


def _from_bytes(word: Any) -> Any:
    """Two signed bytes, at bits 0 and 16: 128 + the low 7 bits, less 128 or, where the sign bit is set, 256."""
    return _subtract(_merge(word, 0x007F007F, _const(_MAGIC)), _merge(word, 0x00800080, _const(_MAGIC)))


def _nibble_pairs(words: list, high: list, fmt: Format) -> list:
    zero = _const(_MAGIC | fmt.zero << 16 | fmt.zero)
    pairs = []
    for p in range(16):
        pair = _merge(_shift_right(words[p // 4], 4 * (p % 4)), 0x000F000F, _const(_MAGIC))
        if high:
            bits = 16 // (16 // len(high))
            slot = p % (16 // len(high))
            mask = ((1 << bits) - 1) << 4
            pair = _merge(_shift_right(high[p // (16 // len(high))], bits * slot - 4), mask << 16 | mask, pair)
        pairs.append(_subtract(pair, zero))
    return pairs


def _table_pairs(words: list) -> list:
    """IQ4_XS: each nibble chooses one of 16 bytes, by two byte permutations and a third that takes one of them."""
    table = [
        _const(int.from_bytes(np.array(IQ4_VALUES[i : i + 4], np.int8).tobytes(), "little")) for i in (0, 4, 8, 12)
    ]

    def look_up(nibbles: Any) -> Any:
        low_bits = _mask(nibbles, 0x7777)
        which = _merge(_shift_right(nibbles, 1), 0x4444, _const(0x3210))
        return _permute(_permute(table[0], table[1], low_bits), _permute(table[2], table[3], low_bits), which)

    pairs = []
    for word in words:
        first, second = look_up(word), look_up(_shift_right(word, 16))
        for i in range(4):
            selector = (4 + i) << 12 | (4 + i) << 8 | i << 4 | i
            pairs.append(_from_bytes(_permute(first, second, _const(selector))))
    return pairs


def _pairs(words: list, high: list, fmt: Format) -> list:
    if fmt.name == "BF16":
        return words
    if fmt.name == "IQ4_XS":
        return _table_pairs(words)
    if fmt.quant_rows == 16:
        return [_from_bytes(_shift_right(words[p // 2], 8 * (p % 2))) for p in range(16)]
    return _nibble_pairs(words, high, fmt)


def _words(plane: Any) -> list:
    return [
        vector.extract(register, dynamic_position=[], static_position=[i])
        for register in plane.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def tile_values(planes: tuple[jax.Array, ...], fmt: Format) -> jax.Array:
    """The quants of a tile, `[64, 64]` bfloat16 in the layout of wgmma's left operand, exact."""

    @plgpu.inline_mgpu(
        arg_types=tuple(plane_layout(p.shape[0]) for p in planes),
        return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=ACCUMULATOR),
    )
    def unpack(_: Any, quants: Any, *high: Any) -> Any:
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty((1, 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        for p, pair in enumerate(_pairs(_words(quants), _words(high[0]) if high else [], fmt)):
            registers[0, p // 2, 0, 0, p % 2, 0, 0, 0, 0] = mgpu.utils.bitcast(pair, two)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return unpack(*planes)


def float16_field(words: jax.Array, half: int) -> jax.Array:
    """The low (0) or high (1) 16 bits of each word, as a float16 number, in float32."""

    @plgpu.inline_mgpu(arg_types=(BY_ROW,), return_type=plgpu.ShapeDtypeStruct(words.shape, jnp.float32, layout=BY_ROW))
    def convert(_: Any, array: Any) -> Any:
        one = ir.VectorType.get((1,), ir.F32Type.get())
        registers = np.empty(array.registers.shape, dtype=object)
        for at in np.ndindex(*array.registers.shape):
            word = vector.extract(array.registers[at], dynamic_position=[], static_position=[0])
            bits = arith.trunci(ir.IntegerType.get_signless(16), _shift_right(word, 16 * half))
            number = arith.extf(ir.F32Type.get(), arith.bitcast(ir.F16Type.get(), bits))
            registers[at] = vector.broadcast(one, number)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return convert(words)  # type: ignore[call-arg]  # the context is given by what decorates it


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Matrices side by side: their registers, renamed."""
    rows, width = parts[0].shape[0], sum(p.shape[1] for p in parts)

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR,) * len(parts),
        return_type=plgpu.ShapeDtypeStruct((rows, width), parts[0].dtype, layout=ACCUMULATOR),
    )
    def join(_: Any, *arrays: Any) -> Any:
        registers = np.concatenate([a.registers for a in arrays], axis=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return join(*parts)


def pairs_swapped(x: jax.Array) -> jax.Array:
    """Float32 values 2i and 2i + 1 of a row exchanged: a thread has both."""
    layout = spread(x.shape[0])

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def swap(_: Any, array: Any) -> Any:
        registers = np.empty(array.registers.shape, dtype=object)
        for at in np.ndindex(*array.registers.shape):
            values = array.registers[at]
            size = ir.VectorType(values.type).shape[0]
            registers[at] = vector.shuffle(values, values, [i ^ 1 for i in range(size)])
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return swap(x)  # type: ignore[call-arg]  # the context is given by what decorates it
