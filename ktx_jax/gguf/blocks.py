# SPDX-License-Identifier: Apache-2.0
"""Dequantization of ggml blocks in plain `jax.numpy`: the exact path's arithmetic.

Each function below reads one block format and returns values `[*lead, nb, block_size]`. Every product
(float16 scale, integer scale, integer quant) fits 24 bits of mantissa, so it is exact in float32 and the
result does not depend on whether the compiler contracts a multiply and an add. Only elementwise operations on
whole-block reshapes are used, so that XLA fuses a function into one loop over the output.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Array, Float, UInt8

# The 16 values of the IQ4 formats, in units of the block scale.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _f16(blocks: jax.Array, at: int) -> jax.Array:
    """The little-endian float16 field at byte `at` of each block, as float32 `[*lead, nb]`."""
    bits = blocks[..., at].astype(jnp.uint16) | (blocks[..., at + 1].astype(jnp.uint16) << 8)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _shifts(bits: int) -> jax.Array:
    """0, bits, 2 bits, ... below 8.

    Written as a slice of an iota: what XLA would compute from one (a product, a comparison), it moves out of the loop
    over tiles that this runs in, and reads back from memory for every value, several times slower.
    """
    return jnp.arange(8, dtype=jnp.uint8)[::bits]


def _planes(packed: jax.Array, bits: int, groups: int = 1) -> jax.Array:
    """Unpacks `8 // bits` fields a byte, each group of bytes giving its lowest fields first.

    `[..., n]` bytes, cut into `groups` equal runs, become `[..., groups * (8 // bits), n // groups]` values:
    the formats store the first half (quarter, eighth) of a run's values in the low bits of its bytes, the
    next in the bits above.
    """
    *lead, n = packed.shape
    shifts = _shifts(bits)[:, None]
    runs = packed.reshape(*lead, groups, 1, n // groups)
    fields = (runs >> shifts) & jnp.uint8((1 << bits) - 1)
    return fields.reshape(*lead, groups * (8 // bits), n // groups)


def _i8(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int8)


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _high_bits(blocks: jax.Array, at: int) -> jax.Array:
    """Bit i of the 32-bit mask at byte `at`, as 0 or 1: `[*lead, nb, 32]`."""
    mask = blocks[..., at : at + 4, None] >> _shifts(1)
    return (mask & jnp.uint8(1)).reshape(*blocks.shape[:-1], 32)


def _flat(values: jax.Array, n: int) -> jax.Array:
    return values.reshape(*values.shape[:-n], -1)


# --- blocks of 32 ---


def _q4_0(b: jax.Array) -> jax.Array:
    q = _i8(_flat(_planes(b[..., 2:], 4), 2)) - jnp.int8(8)
    return _f16(b, 0)[..., None] * _f32(q)


def _q4_1(b: jax.Array) -> jax.Array:
    q = _flat(_planes(b[..., 4:], 4), 2)
    return _f16(b, 0)[..., None] * _f32(q) + _f16(b, 2)[..., None]


def _q5_0(b: jax.Array) -> jax.Array:
    q = _flat(_planes(b[..., 6:], 4), 2) | (_high_bits(b, 2) << 4)
    return _f16(b, 0)[..., None] * _f32(_i8(q) - jnp.int8(16))


def _q5_1(b: jax.Array) -> jax.Array:
    q = _flat(_planes(b[..., 8:], 4), 2) | (_high_bits(b, 4) << 4)
    return _f16(b, 0)[..., None] * _f32(q) + _f16(b, 2)[..., None]


def _q8_0(b: jax.Array) -> jax.Array:
    return _f32(_i8(b[..., 2:])) * _f16(b, 0)[..., None]


def _iq4_values(q: jax.Array) -> jax.Array:
    table = jnp.asarray(IQ4_VALUES, jnp.float32)
    return jnp.take(table, q.astype(jnp.int32), mode="clip")


def _iq4_nl(b: jax.Array) -> jax.Array:
    return _f16(b, 0)[..., None] * _iq4_values(_flat(_planes(b[..., 2:], 4), 2))


# --- super-blocks of 256 ---


def _k_scales(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eight 6-bit scales and eight 6-bit minima packed in bytes 4-15: two uint8 `[*lead, nb, 8]`.

    Of these, bytes 0-3 and 4-7 hold the first four scales and minima in their low 6 bits; bytes 8-11 the low
    4 bits of the last four scales (low nibble) and minima (high nibble), whose upper 2 bits are the top bits
    of bytes 0-7.
    """
    low_scale, low_min, high = b[..., None, 4:8], b[..., None, 8:12], b[..., None, 12:16]
    last = jnp.arange(2, dtype=jnp.uint8)[:, None]

    def pick(first_four: jax.Array, last_four: jax.Array) -> jax.Array:
        return _flat(first_four + (last_four - first_four) * last, 2)

    scale = pick(low_scale & 0x3F, (high & 0x0F) | ((low_scale >> 2) & 0x30))
    minimum = pick(low_min & 0x3F, (high >> 4) | ((low_min >> 2) & 0x30))
    return scale, minimum


def _affine(b: jax.Array, d_at: int, scale: jax.Array, minimum: jax.Array, q: jax.Array) -> jax.Array:
    """d·scale·q - dmin·minimum, d and dmin at bytes `d_at` and `d_at + 2`, q `[..., groups, values]`."""
    d = _f16(b, d_at)[..., None] * _f32(scale)
    m = _f16(b, d_at + 2)[..., None] * _f32(minimum)
    return _flat(d[..., None] * _f32(q) - m[..., None], 2)


def _q2_k(b: jax.Array) -> jax.Array:
    q = _planes(b[..., 16:80], 2, groups=2)
    q = q.reshape(*q.shape[:-2], 16, 16)
    return _affine(b, 80, b[..., :16] & 0x0F, b[..., :16] >> 4, q)


def _q3_k(b: jax.Array) -> jax.Array:
    low = _planes(b[..., 32:96], 2, groups=2)
    high = _planes(b[..., :32], 1)
    # The high bit is stored inverted: clear means "subtract 4".
    q = _i8(low) - _i8((high ^ 1) << 2)
    q = _f32(q).reshape(*q.shape[:-2], 16, 16)
    scale = _flat(_planes(b[..., 96:104], 4), 2) | (_flat(_planes(b[..., 104:108], 2), 2) << 4)
    d = _f16(b, 108)[..., None] * _f32(_i8(scale) - jnp.int8(32))
    return _flat(d[..., None] * q, 2)


def _q4_k(b: jax.Array) -> jax.Array:
    return _affine(b, 0, *_k_scales(b), _planes(b[..., 16:], 4, groups=4))


def _q5_k(b: jax.Array) -> jax.Array:
    q = _planes(b[..., 48:], 4, groups=4) | (_planes(b[..., 16:48], 1) << 4)
    return _affine(b, 0, *_k_scales(b), q)


def _q6_k(b: jax.Array) -> jax.Array:
    low = _planes(b[..., :128], 4, groups=2)  # [..., 4, 64]
    low = low.reshape(*low.shape[:-2], 8, 32)
    q = _i8(low | (_planes(b[..., 128:192], 2, groups=2) << 4)) - jnp.int8(32)
    d = _f16(b, 208)[..., None] * _f32(_i8(b[..., 192:208]))
    return _flat(d[..., None] * _f32(q).reshape(*q.shape[:-2], 16, 16), 2)


def _iq4_xs(b: jax.Array) -> jax.Array:
    low = b[..., 4:8, None] >> _shifts(4)
    high = b[..., 2:4, None] >> _shifts(2)
    scale = (_flat(low, 2) & 0x0F) | ((_flat(high, 2) & 0x03) << 4)
    d = _f16(b, 0)[..., None] * _f32(_i8(scale) - jnp.int8(32))
    q = _planes(b[..., 8:], 4, groups=8)  # [..., 16, 16]
    return _flat(d[..., None] * _iq4_values(q.reshape(*q.shape[:-2], 8, 32)), 2)


# --- floats: one value a block, so no arithmetic that could flush a subnormal ---


def _f32_block(b: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(b, jnp.float32)[..., None]


def _f16_block(b: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(b, jnp.float16).astype(jnp.float32)[..., None]


def _bf16_block(b: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(b, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]


_T = GGMLQuantizationType
_FORMATS: dict[GGMLQuantizationType, Callable[[jax.Array], jax.Array]] = {
    _T.F32: _f32_block,
    _T.F16: _f16_block,
    _T.BF16: _bf16_block,
    _T.Q4_0: _q4_0,
    _T.Q4_1: _q4_1,
    _T.Q5_0: _q5_0,
    _T.Q5_1: _q5_1,
    _T.Q8_0: _q8_0,
    _T.Q2_K: _q2_k,
    _T.Q3_K: _q3_k,
    _T.Q4_K: _q4_k,
    _T.Q5_K: _q5_k,
    _T.Q6_K: _q6_k,
    _T.IQ4_NL: _iq4_nl,
    _T.IQ4_XS: _iq4_xs,
}

NATIVE_TYPES: frozenset[GGMLQuantizationType] = frozenset(_FORMATS)
"""Types that stay as they are in the file; others are converted while loading (`ktx_jax.gguf.convert`)."""


def dequantize(
    blocks: UInt8[Array, "*lead nb ts"],
    ggml_type: GGMLQuantizationType,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "*lead K"]:
    """The values of raw ggml blocks, `K = nb * block_size`, computed in float32 and then cast to `dtype`.

    In float32 the result equals gguf-py's `gguf.quants.dequantize` bit for bit, jitted or not.

    Raises `ValueError` for a type outside `NATIVE_TYPES` or a last axis that is not the type's block in
    bytes.
    """
    if ggml_type not in _FORMATS:
        raise ValueError(f"{ggml_type.name} blocks are not dequantized in the step: convert them to Q8_0 while loading")
    type_size = GGML_QUANT_SIZES[ggml_type][1]
    if blocks.shape[-1] != type_size:
        raise ValueError(
            f"{ggml_type.name} blocks have {type_size} bytes; the last axis of {blocks.shape} has {blocks.shape[-1]}"
        )
    values = _FORMATS[ggml_type](blocks)
    return _flat(values, 2).astype(dtype)
