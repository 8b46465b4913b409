# SPDX-License-Identifier: Apache-2.0
"""ggml blocks to records (`pallas_kernels.formats`), bit by bit: nothing is rounded.

A jitted function: where the file's bytes are brought to a GPU first, the GPU permutes them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt8

from pallas_kernels.formats import ROWS, TILE, Format, format_of

# Bytes of blocks packed at once: what is in between takes a few times as many.
_BYTES_AT_ONCE = 16 << 20


class _Fields(NamedTuple):
    """The fields of 64 rows of blocks."""

    quants: jax.Array  # [64, K] uint8 as stored (uint16 bits for BF16)
    scales: jax.Array | None  # [64, records, scale_rows] uint32 words
    factors: jax.Array | None  # [64, records, 1] uint32 words


def _halves(packed: jax.Array) -> jax.Array:
    """The low nibbles of the last axis, then the high ones."""
    return jnp.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _words(fields: jax.Array, bits: int) -> jax.Array:
    """Little-endian words of the fields of the last axis: `[..., n]` -> uint32 `[..., n * bits / 32]`."""
    a_word = 32 // bits
    wide = fields.astype(jnp.uint32).reshape(*fields.shape[:-1], -1, a_word)
    return _merged([wide[..., i] << (bits * i) for i in range(a_word)])


def _merged(words: list[jax.Array]) -> jax.Array:
    total = words[0]
    for word in words[1:]:
        total = total | word
    return total


def _words16(b: jax.Array) -> jax.Array:
    """Two bytes of the last axis a word."""
    return b[..., 0::2].astype(jnp.uint32) | b[..., 1::2].astype(jnp.uint32) << 8


def _pair_scales(b: jax.Array) -> jax.Array:
    """A float16 at the start of each block of 32 -> a word for two blocks: `[64, K/64, 1]`."""
    d = _words16(b[..., :2])[..., 0]
    return (d[:, 0::2] | d[:, 1::2] << 16)[..., None]


def _q4_0(b: jax.Array) -> _Fields:
    return _Fields(_halves(b[..., 2:]), _pair_scales(b), None)


def _q5_0(b: jax.Array) -> _Fields:
    fifth = (b[..., 2:6, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return _Fields(_halves(b[..., 6:]) | fifth.reshape(*b.shape[:-1], 32) << 4, _pair_scales(b), None)


def _q8_0(b: jax.Array) -> _Fields:
    return _Fields(b[..., 2:], _pair_scales(b), None)


def _k_head(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and factor words of Q4_K and Q5_K: for two groups (scale, minimum, scale, minimum); d, dmin."""
    low_scale, low_min, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = jnp.concatenate([low_scale & 0x3F, (high & 0x0F) | ((low_scale >> 2) & 0x30)], axis=-1)
    minimum = jnp.concatenate([low_min & 0x3F, (high >> 4) | ((low_min >> 2) & 0x30)], axis=-1)
    return _words(jnp.stack([scale, minimum], axis=-1).reshape(*b.shape[:-1], 16), 8), _words(b[..., :4], 8)


def _q4_k(b: jax.Array) -> _Fields:
    return _Fields(_halves(b[..., 16:].reshape(*b.shape[:-1], 4, 32)), *_k_head(b))


def _q5_k(b: jax.Array) -> _Fields:
    low = _halves(b[..., 48:].reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 8, 32)
    fifth = (b[..., None, 16:48] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
    return _Fields(low | fifth << 4, *_k_head(b))


def _q6_k(b: jax.Array) -> _Fields:
    low = _halves(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 2, 4, 32)
    fields = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32)
    high = (fields >> jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]) & 3
    return _Fields(low | high << 4, _words(b[..., 192:208], 8), _words16(b[..., 208:210]))


def _iq4_xs(b: jax.Array) -> _Fields:
    low = jnp.stack([b[..., 4:8] & 0x0F, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    high = (b[..., 2:4, None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8)) & 3
    scales = low | high.reshape(*b.shape[:-1], 8) << 4
    return _Fields(_halves(b[..., 8:].reshape(*b.shape[:-1], 8, 16)), _words(scales, 8), _words16(b[..., :2]))


def _bf16(b: jax.Array) -> _Fields:
    return _Fields(b[..., 0].astype(jnp.uint16) | b[..., 1].astype(jnp.uint16) << 8, None, None)


_READERS: dict[str, Callable[[jax.Array], _Fields]] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "BF16": _bf16,
}


def _fragments(quants: jax.Array) -> jax.Array:
    """`[64, K]` -> `[K/64, 128 threads, 16 pairs, 2]`: pair 4j + 2 (right 8 columns) + (lower 8 rows)."""
    tiles = quants.shape[1] // TILE
    split = quants.reshape(4, 2, 8, tiles, 4, 2, 4, 2)  # warp, lower, r | tile, j, right, c, e
    return split.transpose(3, 0, 2, 6, 4, 5, 1, 7).reshape(tiles, 128, 16, 2)


def _field_words(fields: jax.Array, bits: int) -> jax.Array:
    """Packs `[tiles, 128, 16, 2]` fields of `bits` bits: 16 / bits pairs a word, a pair's two 16 bits apart.

    Returns words in the order in which a warpgroup loads them, vectors of up to four a thread: `[tiles, rows, 64]`.
    """
    a_word = 16 // bits
    wide = fields.reshape(-1, 128, 16 // a_word, a_word, 2).astype(jnp.uint32)
    words = _merged([wide[..., i, half] << (bits * i + 16 * half) for i in range(a_word) for half in range(2)])
    vector = min(words.shape[-1], 4)
    return words.reshape(-1, 128, words.shape[-1] // vector, vector).swapaxes(1, 2).reshape(fields.shape[0], -1, 64)


def _slice_records(blocks: jax.Array, fmt: Format) -> jax.Array:
    """The blocks of 64 rows, `[64, nb, bytes]` -> records `[K/depth, rows, 64]`."""
    fields = _READERS[fmt.name](blocks)
    tiles = _fragments(fields.quants.reshape(ROWS, -1))
    records = tiles.shape[0] // fmt.tiles
    bits = fmt.quant_rows // 2
    planes = [_field_words(tiles if bits > 4 else tiles & 0x0F, bits)]
    if fmt.high_rows:
        planes.append(_field_words(tiles >> 4, fmt.high_rows // 2))
    parts = [p.reshape(records, -1, 64) for p in planes]
    parts += [words.transpose(1, 2, 0) for words in (fields.scales, fields.factors) if words is not None]
    return lax.bitcast_convert_type(jnp.concatenate(parts, axis=1), jnp.int32)


@partial(jax.jit, static_argnames="name")
def pack(
    blocks: UInt8[Array, "*lead N nb ts"] | UInt8[np.ndarray, "*lead N nb ts"], name: str
) -> Int32[Array, "*lead n k rows 64"]:
    """The records of raw ggml blocks of type `name`, on the device where the blocks are.

    Raises `NotImplementedError` for a type without a layout, or for sizes that records do not divide.
    """
    fmt = format_of(name)
    *lead, n, nb, size = blocks.shape
    if size != fmt.block_bytes:
        raise ValueError(f"{name} blocks have {fmt.block_bytes} bytes; the last axis of {blocks.shape} has {size}")
    shape = fmt.record_shape((*lead, n, nb * fmt.block))
    slices = jnp.reshape(blocks, (-1, ROWS, nb, size))
    at_once = max(1, min(slices.shape[0], _BYTES_AT_ONCE // math.prod(slices.shape[1:])))
    return lax.map(partial(_slice_records, fmt=fmt), slices, batch_size=at_once).reshape(shape)


assert TILE == ROWS  # _fragments cuts square tiles
