# SPDX-License-Identifier: Apache-2.0
"""Where a quantized row may be cut, and how many bytes the pieces take.

K-quants share a super-block's scales among 256 values, and have scales of their own for every 32 or 16 of them. A row
may be cut between those: a piece then holds every super-block that it touches, scales repeated and the rest zero, and
all pieces have the size of the largest.
"""

import math

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

_T = GGMLQuantizationType

GRANULES: dict[GGMLQuantizationType, int] = {
    _T.F32: 1, _T.F16: 1, _T.BF16: 1,
    _T.Q4_0: 32, _T.Q4_1: 32, _T.Q5_0: 32, _T.Q5_1: 32, _T.Q8_0: 32, _T.IQ4_NL: 32,
    _T.Q2_K: 16, _T.Q3_K: 16, _T.Q4_K: 32, _T.Q5_K: 32, _T.Q6_K: 16, _T.IQ4_XS: 32,
}  # fmt: skip
"""The values along K that must stay together, for each type that stays as it is in the file."""


def stored_type(ggml_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type in memory: rare types become Q8_0 while loading."""
    return ggml_type if ggml_type in GRANULES else _T.Q8_0


def stored_bytes(shape: tuple[int, ...], ggml_type: GGMLQuantizationType, cuts: tuple[int, ...] = ()) -> int:
    """Bytes of one piece of an array of logical `shape` and stored type, cut into `cuts[i]` equal parts along axis i.

    The parts must divide their axes, the last one's at the type's granule.
    """
    cuts = cuts + (1,) * (len(shape) - len(cuts))
    *rows, _ = (size // parts for size, parts in zip(shape, cuts, strict=True))
    size = GGML_QUANT_SIZES[ggml_type][1]
    return math.prod(rows) * touched_blocks(shape[-1], ggml_type, cuts[-1]) * size


def touched_blocks(k: int, ggml_type: GGMLQuantizationType, parts: int) -> int:
    """Blocks in a row of each piece where `k` values are cut into `parts`: as many as the piece that touches most."""
    block, size = GGML_QUANT_SIZES[ggml_type][0], k // parts
    return max(-(-(i + 1) * size // block) - i * size // block for i in range(parts))


def piece(
    blocks: UInt8[np.ndarray, "*lead nb ts"], ggml_type: GGMLQuantizationType, parts: int, index: int
) -> UInt8[np.ndarray, "*lead piece ts"]:
    """Part `index` of `parts` along the input dimension: the blocks it touches, what is not its own set to zero.

    A view where the cuts lie between blocks.
    """
    block, type_size = GGML_QUANT_SIZES[ggml_type]
    count = blocks.shape[-2]
    size = count * block // parts
    width, first = touched_blocks(count * block, ggml_type, parts), index * size // block
    if size % block == 0:
        return blocks[..., first : first + width, :]
    out = np.zeros((*blocks.shape[:-2], width, type_size), np.uint8)
    have = blocks[..., first : first + width, :]
    out[..., : have.shape[-2], :] = have
    begin = index * size - first * block
    granule = GRANULES[ggml_type]
    inside = np.zeros(width * block // granule, bool)
    inside[begin // granule : (begin + size) // granule] = True
    _ZERO[ggml_type](out, inside.reshape(width, -1))
    return out


def _zero_k4(blocks: np.ndarray, inside: np.ndarray) -> None:
    """Q4_K, Q5_K: eight 6-bit scales and minima in bytes 4 to 15 (ggml's `get_scale_min_k4`)."""
    for at, j in np.argwhere(~inside):
        scales = blocks[..., at, 4:16]
        if j < 4:
            scales[..., j] &= 0xC0
            scales[..., j + 4] &= 0xC0
        else:
            scales[..., j + 4] = 0
            scales[..., j - 4] &= 0x3F
            scales[..., j] &= 0x3F


def _zero_q6(blocks: np.ndarray, inside: np.ndarray) -> None:
    """Q6_K: sixteen int8 scales from byte 192."""
    for at, j in np.argwhere(~inside):
        blocks[..., at, 192 + j] = 0


def _zero_q2(blocks: np.ndarray, inside: np.ndarray) -> None:
    """Q2_K: sixteen scales and minima, a nibble each, at the start."""
    for at, j in np.argwhere(~inside):
        blocks[..., at, j] = 0


def _zero_q3(blocks: np.ndarray, inside: np.ndarray) -> None:
    """Q3_K: sixteen 6-bit scales from byte 96, zero at 32: low nibbles in 8 bytes, then the upper two bits in 4."""
    for at, j in np.argwhere(~inside):
        scales = blocks[..., at, 96:108]
        scales[..., j % 8] &= 0xF0 if j < 8 else 0x0F
        shift = 2 * (j // 4)
        scales[..., 8 + j % 4] = scales[..., 8 + j % 4] & (0xFF ^ 3 << shift) | 2 << shift


def _zero_iq4(blocks: np.ndarray, inside: np.ndarray) -> None:
    """IQ4_XS: eight 6-bit scales, zero at 32: upper two bits in bytes 2 and 3, low nibbles in bytes 4 to 7."""
    for at, j in np.argwhere(~inside):
        blocks[..., at, 4 + j // 2] &= 0x0F if j % 2 else 0xF0
        shift = 2 * (j % 4)
        blocks[..., at, 2 + j // 4] = blocks[..., at, 2 + j // 4] & (0xFF ^ 3 << shift) | 2 << shift


_ZERO = {_T.Q2_K: _zero_q2, _T.Q3_K: _zero_q3, _T.Q4_K: _zero_k4, _T.Q5_K: _zero_k4, _T.Q6_K: _zero_q6,
         _T.IQ4_XS: _zero_iq4}  # fmt: skip
