# SPDX-License-Identifier: Apache-2.0
"""Random weights made directly as ggml blocks: uniform quants under scales that give a wanted standard deviation.

Quantizing random floats would take hours for a large model; random bytes with only the scale fields set take seconds.
The mean is zero: formats without an offset get scales of random sign, those with one an offset of half the range.
"""

from collections.abc import Iterator

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

from ktx_jax.errors import KtxError
from ktx_jax.gguf.blocks import IQ4_VALUES
from ktx_jax.gguf.quantize import quantize

_T = GGMLQuantizationType
_PIECE_BYTES = 4 << 20


def _rms(values: range | tuple[int, ...]) -> float:
    return float(np.sqrt(np.mean(np.square(np.array(values, np.float64)))))


_INT8 = _rms(range(-128, 128))
_INT6 = _rms(range(-32, 32))
_UINT6 = _rms(range(64))

# For each format without an offset: the byte of its float16 scale, and the RMS of its uniform values in units of it.
_SIGNED: dict[GGMLQuantizationType, tuple[int, float]] = {
    _T.Q4_0: (0, _rms(range(-8, 8))),
    _T.Q5_0: (0, _rms(range(-16, 16))),
    _T.Q8_0: (0, _INT8),
    _T.Q6_K: (208, _INT8 * _INT6),
    _T.IQ4_NL: (0, _rms(IQ4_VALUES)),
    _T.IQ4_XS: (0, _INT6 * _rms(IQ4_VALUES)),
}
# For each format with one: the number of levels; the sign of the offset; the RMS of the group scales.
_AFFINE: dict[GGMLQuantizationType, tuple[int, int, float]] = {
    _T.Q4_1: (16, -1, 1.0),
    _T.Q5_1: (32, -1, 1.0),
    _T.Q4_K: (16, 1, _UINT6),
    _T.Q5_K: (32, 1, _UINT6),
}
_FLOATS = (_T.F32, _T.F16, _T.BF16)


def random_pieces(
    rng: np.random.Generator, ggml_type: GGMLQuantizationType, elements: int, std: float
) -> Iterator[UInt8[np.ndarray, "n ts"]]:
    """Blocks of `elements` random values of mean 0 and standard deviation `std`, in pieces of a few MB.

    Raises `KtxError` for a type that no mix uses.
    """
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    if ggml_type not in _SIGNED and ggml_type not in _AFFINE and ggml_type not in _FLOATS:
        raise KtxError(f"no random blocks of type {ggml_type.name}")
    blocks = elements // block_size
    step = _PIECE_BYTES // type_size
    for at in range(0, blocks, step):
        n = min(step, blocks - at)
        if ggml_type in _FLOATS:
            values = rng.standard_normal(n, np.float32)[:, None] * np.float32(std)
            yield quantize(values, ggml_type).reshape(n, type_size)
        else:
            yield _random_blocks(rng, ggml_type, n, std)


def _random_blocks(rng: np.random.Generator, ggml_type: GGMLQuantizationType, n: int, std: float) -> np.ndarray:
    type_size = GGML_QUANT_SIZES[ggml_type][1]
    words = rng.integers(0, np.iinfo(np.uint64).max, -(-n * type_size // 8), np.uint64, endpoint=True)
    blocks = words.view(np.uint8)[: n * type_size].reshape(n, type_size)
    if ggml_type in _SIGNED:
        at, rms = _SIGNED[ggml_type]
        low, high = np.float16(std / rms).tobytes()
        blocks[:, at] = low
        blocks[:, at + 1] = (blocks[:, at + 1] & 0x80) | high
        return blocks
    count, sign, rms = _AFFINE[ggml_type]
    middle = (count - 1) / 2
    d = std / (rms * _rms(tuple(range(1 - count, count, 2))) / 2)
    head = np.array([d, sign * middle * d], np.float16)
    blocks[:, :4] = head.view(np.uint8)
    if rms != 1.0:
        # Minima equal to the scales, so that each group is centred.
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = (blocks[:, 12:16] & 0x0F) * 0x11
    return blocks
