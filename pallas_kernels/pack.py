# SPDX-License-Identifier: Apache-2.0
"""ggml blocks to records (`pallas_kernels.formats`) in NumPy, bit by bit: nothing is rounded."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from pallas_kernels.formats import ROWS, TILE, Format, format_of

# Rows packed at once: temporaries are about eight bytes a value of these.
_ROWS_AT_ONCE = 1024


class _Fields(NamedTuple):
    """The fields of a matrix's blocks."""

    quants: np.ndarray  # [N, K] uint8 as stored (uint16 bits for BF16)
    scales: np.ndarray | None  # [N, records, scale_rows] uint32 words
    factors: np.ndarray | None  # [N, records] uint32 words


def _halves(packed: np.ndarray) -> np.ndarray:
    """The low nibbles of the last axis, then the high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _words16(b: np.ndarray) -> np.ndarray:
    """Little-endian 16-bit fields of the last axis, as uint32."""
    return np.ascontiguousarray(b).view("<u2").astype(np.uint32)


def _bytes_to_words(b: np.ndarray) -> np.ndarray:
    """Four bytes of the last axis a word."""
    return np.ascontiguousarray(b, np.uint8).view("<u4").astype(np.uint32)


def _pair_scales(d: np.ndarray) -> np.ndarray:
    """One float16 a block of 32 -> a word for two blocks: `[N, K/64, 1]`."""
    return (d[:, 0::2] | d[:, 1::2] << 16)[..., None]


def _q4_0(b: np.ndarray) -> _Fields:
    return _Fields(_halves(b[..., 2:]), _pair_scales(_words16(b[..., :2])[..., 0]), None)


def _q5_0(b: np.ndarray) -> _Fields:
    fifth = np.unpackbits(np.ascontiguousarray(b[..., 2:6]), axis=-1, bitorder="little")
    return _Fields(_halves(b[..., 6:]) | fifth << 4, _pair_scales(_words16(b[..., :2])[..., 0]), None)


def _q8_0(b: np.ndarray) -> _Fields:
    return _Fields(b[..., 2:], _pair_scales(_words16(b[..., :2])[..., 0]), None)


def _k_head(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and factor words of Q4_K and Q5_K: for two groups (scale, minimum, scale, minimum); d, dmin."""
    low_scale, low_min, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = np.concatenate([low_scale & 0x3F, (high & 0x0F) | ((low_scale >> 2) & 0x30)], axis=-1)
    minimum = np.concatenate([low_min & 0x3F, (high >> 4) | ((low_min >> 2) & 0x30)], axis=-1)
    words = _bytes_to_words(np.stack([scale, minimum], axis=-1).reshape(*b.shape[:-1], 16))
    return words, _bytes_to_words(b[..., :4])[..., 0]


def _q4_k(b: np.ndarray) -> _Fields:
    return _Fields(_halves(b[..., 16:].reshape(*b.shape[:-1], 4, 32)), *_k_head(b))


def _q5_k(b: np.ndarray) -> _Fields:
    low = _halves(b[..., 48:].reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 8, 32)
    fifth = (b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _Fields(low | fifth << 4, *_k_head(b))


def _q6_k(b: np.ndarray) -> _Fields:
    low = _halves(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 2, 4, 32)
    fields = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32)
    high = (fields >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    return _Fields(low | high << 4, _bytes_to_words(b[..., 192:208]), _words16(b[..., 208:210])[..., 0])


def _iq4_xs(b: np.ndarray) -> _Fields:
    low = np.stack([b[..., 4:8] & 0x0F, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    high = (_words16(b[..., 2:4]) >> np.arange(0, 16, 2, dtype=np.uint32)) & 3
    quants = _halves(b[..., 8:].reshape(*b.shape[:-1], 8, 16))
    return _Fields(quants, _bytes_to_words(low | high.astype(np.uint8) << 4), _words16(b[..., :2])[..., 0])


def _bf16(b: np.ndarray) -> _Fields:
    return _Fields(np.ascontiguousarray(b).view("<u2"), None, None)


_READERS: dict[str, Callable[[np.ndarray], _Fields]] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "BF16": _bf16,
}


def _fragments(quants: np.ndarray) -> np.ndarray:
    """`[N, K]` -> `[N/64, K/64, 128 threads, 16 pairs, 2]`: pair 4j + 2 (right 8 columns) + (lower 8 rows)."""
    n, k = quants.shape
    split = quants.reshape(n // 64, 4, 2, 8, k // 64, 4, 2, 4, 2)  # tile, warp, lower, r | tile, j, right, c, e
    return split.transpose(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(n // 64, k // 64, 128, 16, 2)


def _field_words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Packs `[..., 128, 16, 2]` fields of `bits` bits: 16 / bits pairs a word, a pair's two 16 bits apart.

    Returns words in the order in which a warpgroup loads them, vectors of up to four words a thread: `[..., 128 * W]`.
    """
    a_word = 16 // bits
    halves = fields.reshape(*fields.shape[:-2], 16 // a_word, a_word, 2).swapaxes(-1, -2)  # word, half, pair
    if bits < 8:
        a_byte = 8 // bits
        halves = halves.reshape(*halves.shape[:-1], a_word // a_byte, a_byte)
        packed = halves[..., 0].copy()
        for slot in range(1, a_byte):
            packed |= halves[..., slot] << (bits * slot)
        halves = packed
    words = np.ascontiguousarray(halves).reshape(*fields.shape[:-2], 16 // a_word, -1).view("<u4")[..., 0]
    vector = min(words.shape[-1], 4)
    vectors = words.reshape(*words.shape[:-1], -1, vector)  # [..., 128, W/v, v]
    return np.moveaxis(vectors, -2, -3).reshape(*fields.shape[:-3], -1)


def _records(blocks: np.ndarray, fmt: Format) -> np.ndarray:
    """Blocks `[N, nb, bytes]` -> records `[N/64, K/depth, rows, 64]`."""
    fields = _READERS[fmt.name](blocks)
    n = blocks.shape[0]
    quants = fields.quants.reshape(n, -1)
    tiles = _fragments(quants)
    bits = fmt.quant_rows // 2
    low = tiles if bits > 4 else tiles & 0x0F
    records = quants.shape[1] // fmt.depth
    planes = [_field_words(low, bits)]
    if fmt.high_rows:
        planes.append(_field_words(tiles >> 4, fmt.high_rows // 2))
    parts = [p.reshape(n // ROWS, records, -1, 64) for p in planes]
    for words in (fields.scales, None if fields.factors is None else fields.factors[..., None]):
        if words is not None:  # [N, records, w] -> [N/64, records, w, 64]
            parts.append(words.reshape(n // ROWS, ROWS, records, -1).transpose(0, 2, 3, 1))
    return np.concatenate(parts, axis=2).astype(np.uint32, copy=False).view(np.int32)


def pack(blocks: UInt8[np.ndarray, "*lead N nb ts"], name: str) -> Int32[np.ndarray, "*lead n k rows 64"]:
    """The records of raw ggml blocks of type `name`.

    Raises `NotImplementedError` for a type without a layout, or for sizes that records do not divide.
    """
    fmt = format_of(name)
    *lead, n, nb, size = blocks.shape
    if size != fmt.block_bytes:
        raise ValueError(f"{name} blocks have {fmt.block_bytes} bytes; the last axis of {blocks.shape} has {size}")
    out = np.empty(fmt.record_shape((*lead, n, nb * fmt.block)), np.int32)
    for at in np.ndindex(*lead):
        for row in range(0, n, _ROWS_AT_ONCE):
            rows = blocks[at][row : row + _ROWS_AT_ONCE]
            out[at][row // ROWS : (row + rows.shape[0]) // ROWS] = _records(rows, fmt)
    return out


assert TILE == ROWS  # _fragments cuts square tiles
