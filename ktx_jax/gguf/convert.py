# SPDX-License-Identifier: Apache-2.0
"""Conversion to Q8_0 while loading, of ggml types that the step's arithmetic, or a kernel, does not know."""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from jaxtyping import UInt8

from ktx_jax.gguf.quantize import quantize

_T = GGMLQuantizationType
CONVERTED_TYPES: frozenset[GGMLQuantizationType] = frozenset(
    {
        _T.IQ1_S,
        _T.IQ1_M,
        _T.IQ2_XXS,
        _T.IQ2_XS,
        _T.IQ2_S,
        _T.IQ3_XXS,
        _T.IQ3_S,
        _T.TQ1_0,
        _T.TQ2_0,
        _T.MXFP4,
        _T.NVFP4,
    }
)
"""Types that gguf-py can dequantize and that are not native: they become Q8_0."""

_WITHOUT_RECORDS = frozenset({_T.Q4_1, _T.Q5_1, _T.Q2_K, _T.Q3_K, _T.IQ4_NL})
"""Native types that the GPU kernels have no layout for."""

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_CHUNK = 1 << 20  # values converted at a time: bounds the float32 copy


def to_q8_0(
    blocks: UInt8[np.ndarray, "*lead nb ts"], ggml_type: GGMLQuantizationType
) -> tuple[UInt8[np.ndarray, "*lead nb8 34"], float]:
    """Q8_0 blocks of the same values, and the relative error this costs: RMS of the change over RMS of the values.

    IQ4_NL becomes Q8_0 exactly: its levels are whole numbers. Works in chunks, so the float32 values of at most about a
    million elements exist at a time.

    Raises `ValueError` for a type that is never converted, and for values that Q8_0 cannot hold (not finite, or a
    scale beyond float16).
    """
    if ggml_type == _T.IQ4_NL:
        return _iq4_nl(blocks), 0.0
    if ggml_type not in CONVERTED_TYPES | _WITHOUT_RECORDS:
        raise ValueError(f"{ggml_type.name} is not among the types that are converted to Q8_0 while loading")
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    source = np.ascontiguousarray(blocks).reshape(-1, type_size)
    factor = block_size // 32
    out = np.empty((len(source), factor, 34), np.uint8)
    change = total = 0.0
    step = _CHUNK // block_size
    for at in range(0, len(source), step):
        values = quants.dequantize(source[at : at + step], ggml_type)
        part = quantize(values, _T.Q8_0)
        out[at : at + step] = part
        back = quants.dequantize(part.reshape(len(part), -1), _T.Q8_0)
        change += float(np.sum(np.square(back - values), dtype=np.float64))
        total += float(np.sum(np.square(values), dtype=np.float64))
    *lead, nb, _ = blocks.shape
    return out.reshape(*lead, nb * factor, 34), (change / total) ** 0.5 if total else 0.0


def _iq4_nl(blocks: UInt8[np.ndarray, "*lead nb 18"]) -> UInt8[np.ndarray, "*lead nb 34"]:
    """The levels of IQ4_NL's table as the quants of Q8_0, under the same scale."""
    packed = blocks[..., 2:]
    levels = _IQ4_VALUES[np.concatenate([packed & 0x0F, packed >> 4], axis=-1)]
    return np.concatenate([blocks[..., :2], levels.view(np.uint8)], axis=-1)
