# SPDX-License-Identifier: Apache-2.0
"""Dequantization of ggml blocks in plain `jax.numpy`: the exact path's arithmetic.

Each function below reads one block format and returns values `[*lead, nb, ...]`, the format's own groups as the
last axes. Every product (float16 scale, integer scale, integer quant) fits 24 bits of mantissa, so it is exact in
float32 and the result does not depend on whether the compiler contracts a multiply and an add. Operations are
elementwise on reshaped blocks, so that XLA makes one loop of a function, with contiguous innermost axes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, UInt8

# The 16 values of the IQ4 formats, in units of the block scale.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _f16(blocks: jax.Array, at: int) -> jax.Array:
    """The little-endian float16 field at byte `at` of each block, as float32 `[*lead, nb]`."""
    bits = blocks[..., at].astype(jnp.uint16) | (blocks[..., at + 1].astype(jnp.uint16) << 8)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _planes(packed: jax.Array, bits: int, groups: int = 1) -> jax.Array:
    """Unpacks `8 // bits` fields a byte, each group of bytes giving its lowest fields first.

    `[..., n]` bytes, cut into `groups` equal runs, become `[..., groups * (8 // bits), n // groups]` values:
    the formats store the first half (quarter, eighth) of a run's values in the low bits of its bytes, the
    next in the bits above.
    """
    *lead, n = packed.shape
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    runs = packed.reshape(*lead, groups, 1, n // groups)
    fields = (runs >> shifts) & jnp.uint8((1 << bits) - 1)
    return fields.reshape(*lead, groups * (8 // bits), n // groups)


def _i8(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int8)


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _split(x: jax.Array, *axes: int) -> jax.Array:
    """The last axis as `axes`."""
    return x.reshape(*x.shape[:-1], *axes)


def _each(x: jax.Array, values: jax.Array) -> jax.Array:
    """A field of every block, against the block's values."""
    return x.reshape(*x.shape, *(1,) * (values.ndim - x.ndim))


# --- blocks of 32 ---


def _five_bits(b: jax.Array, at: int) -> jax.Array:
    """32 values `[*lead, nb, 2, 2, 8]`: a mask of their fifth bits at byte `at`, then their low nibbles."""
    mask = _split(b[..., at : at + 4], 2, 2, 1) >> jnp.arange(8, dtype=jnp.uint8)
    return _split(_planes(b[..., at + 4 :], 4), 2, 8) | ((mask & 1) << 4)


def _q4_0(b: jax.Array) -> jax.Array:
    q = _i8(_planes(b[..., 2:], 4)) - jnp.int8(8)
    return _each(_f16(b, 0), q) * _f32(q)


def _q4_1(b: jax.Array) -> jax.Array:
    q = _planes(b[..., 4:], 4)
    return _each(_f16(b, 0), q) * _f32(q) + _each(_f16(b, 2), q)


def _q5_0(b: jax.Array) -> jax.Array:
    q = _i8(_five_bits(b, 2)) - jnp.int8(16)
    return _each(_f16(b, 0), q) * _f32(q)


def _q5_1(b: jax.Array) -> jax.Array:
    q = _five_bits(b, 4)
    return _each(_f16(b, 0), q) * _f32(q) + _each(_f16(b, 2), q)


def _q8_0(b: jax.Array) -> jax.Array:
    return _f32(_i8(b[..., 2:])) * _f16(b, 0)[..., None]


def _iq4_values(q: jax.Array) -> jax.Array:
    table = jnp.asarray(IQ4_VALUES, jnp.float32)
    return table.at[q].get(mode="promise_in_bounds")


def _iq4_nl(b: jax.Array) -> jax.Array:
    q = _planes(b[..., 2:], 4)
    return _each(_f16(b, 0), q) * _iq4_values(q)


# --- super-blocks of 256 ---


def _k_scales(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eight 6-bit scales and eight 6-bit minima packed in bytes 4-15: two float32 `[*lead, nb, 8]`.

    Of these, bytes 0-3 and 4-7 hold the first four scales and minima in their low 6 bits; bytes 8-11 the low
    4 bits of the last four scales (low nibble) and minima (high nibble), whose upper 2 bits are the top bits
    of bytes 0-7.
    """
    low_scale, low_min, high = b[..., None, 4:8], b[..., None, 8:12], b[..., None, 12:16]
    last = jnp.arange(2, dtype=jnp.uint8)[:, None]

    def pick(first_four: jax.Array, last_four: jax.Array) -> jax.Array:  # exact: uint8 wraps
        return first_four + (last_four - first_four) * last

    scale = pick(low_scale & 0x3F, (high & 0x0F) | ((low_scale >> 2) & 0x30))
    minimum = pick(low_min & 0x3F, (high >> 4) | ((low_min >> 2) & 0x30))
    return _f32(scale).reshape(*b.shape[:-1], 8), _f32(minimum).reshape(*b.shape[:-1], 8)


def _k_affine(b: jax.Array, q: jax.Array) -> jax.Array:
    """d·scale·q - dmin·minimum for q `[*lead, nb, 8, 32]`: what Q4_K and Q5_K, of the same head, share."""
    scale, minimum = _k_scales(b)
    d, m = _f16(b, 0)[..., None] * scale, _f16(b, 2)[..., None] * minimum
    return d[..., None] * _f32(q) - m[..., None]


def _halves(scale: jax.Array) -> jax.Array:
    """Scales of 16 groups of 16 values, against values `[*lead, nb, 8, 32]`."""
    pairs = _split(scale, 8, 2, 1)
    shape = (*scale.shape[:-1], 8, 32)
    first = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < 16
    # Not jnp.where: that is a function of its own, which would be compiled apart too (see `_read_apart`).
    return jax.lax.select(first, jnp.broadcast_to(pairs[..., 0, :], shape), jnp.broadcast_to(pairs[..., 1, :], shape))


def _q2_k(b: jax.Array) -> jax.Array:
    q = _planes(b[..., 16:80], 2, groups=2)
    d = _f16(b, 80)[..., None] * _f32(b[..., :16] & 0x0F)
    m = _f16(b, 82)[..., None] * _f32(b[..., :16] >> 4)
    return _halves(d) * _f32(q) - _halves(m)


def _q3_k(b: jax.Array) -> jax.Array:
    low = _planes(b[..., 32:96], 2, groups=2)
    high = _planes(b[..., :32], 1)
    # The high bit is stored inverted: clear means "subtract 4".
    q = _i8(low) - _i8((high ^ 1) << 2)
    low_scale = _planes(b[..., 96:104], 4)
    high_scale = _planes(b[..., 104:108], 2)
    scale = low_scale.reshape(*low.shape[:-2], 16) | (high_scale.reshape(*low.shape[:-2], 16) << 4)
    d = _f16(b, 108)[..., None] * _f32(_i8(scale) - jnp.int8(32))
    return _halves(d) * _f32(q)


def _q4_k(b: jax.Array) -> jax.Array:
    return _k_affine(b, _planes(b[..., 16:], 4, groups=4))


def _q5_k(b: jax.Array) -> jax.Array:
    q = _planes(b[..., 48:], 4, groups=4) | (_planes(b[..., 16:48], 1) << 4)
    return _k_affine(b, q)


def _q6_k(b: jax.Array) -> jax.Array:
    low = _split(_planes(b[..., :128], 4, groups=2), 2, 32)  # [..., 4, 2, 32]
    high = _planes(b[..., 128:192], 2, groups=2)  # [..., 8, 32]
    q = _i8(low.reshape(high.shape) | (high << 4)) - jnp.int8(32)
    d = _f16(b, 208)[..., None] * _f32(_i8(b[..., 192:208]))
    return _halves(d) * _f32(q)


def _iq4_xs(b: jax.Array) -> jax.Array:
    low = b[..., 4:8, None] >> jnp.arange(0, 8, 4, dtype=jnp.uint8)
    high = b[..., 2:4, None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8)
    scale = (low.reshape(*b.shape[:-1], 8) & 0x0F) | ((high.reshape(*b.shape[:-1], 8) & 0x03) << 4)
    d = _f16(b, 0)[..., None] * _f32(_i8(scale) - jnp.int8(32))
    q = _planes(b[..., 8:], 4, groups=8)  # [..., 16, 16]
    return d[..., None] * _iq4_values(q.reshape(*q.shape[:-2], 8, 32))


# --- floats: one value a block, so no arithmetic that could flush a subnormal ---


def _f32_block(b: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(b, jnp.float32)


def _f16_block(b: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(b, jnp.float16).astype(jnp.float32)


def _bf16_block(b: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(b, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


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

_FLOATS = (_T.F32, _T.F16, _T.BF16)

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
    return _dequantize(blocks, ggml_type, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(1, 2))
def _dequantize(blocks: jax.Array, ggml_type: GGMLQuantizationType, dtype: jnp.dtype) -> jax.Array:
    if ggml_type in _FLOATS:
        return _FORMATS[ggml_type](blocks).astype(dtype)
    inline, apart = (partial(f, ggml_type=ggml_type, dtype=dtype) for f in (_read, _read_apart))
    values = jax.lax.platform_dependent(blocks, cpu=apart, default=inline)
    return values.reshape(*blocks.shape[:-2], -1)


@partial(jax.jit, static_argnames=("ggml_type", "dtype"))
def _read(blocks: jax.Array, ggml_type: GGMLQuantizationType, dtype: jnp.dtype) -> jax.Array:
    return _FORMATS[ggml_type](blocks).astype(dtype)


def _read_apart(blocks: jax.Array, ggml_type: GGMLQuantizationType, dtype: jnp.dtype) -> jax.Array:
    """The same, compiled apart from what makes the blocks and what takes the values.

    XLA's CPU backend vectorizes these loops where the input is a plain buffer and the result keeps the format's
    own axes. Fused with the slice that cuts a tile from a weight, or with the reshape to rows, they would run
    value by value, 2 to 15 times slower.
    """
    with set_xla_metadata(inlineable="false"):
        return _read(blocks, ggml_type=ggml_type, dtype=dtype)
