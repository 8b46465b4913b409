# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels are compared with: random blocks, gguf-py's values, and NumPy on the same int8 activations."""

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as T

K_QUANTS = (T.Q4_K, T.Q6_K, T.Q5_K, T.IQ4_XS, T.Q2_K, T.Q3_K)
BLOCKS_OF_32 = (T.Q5_0, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_1, T.IQ4_NL)
FLOATS = (T.F16, T.BF16, T.F32)
TYPES = K_QUANTS + BLOCKS_OF_32 + FLOATS

# Where a block keeps its float16 scales.
_SCALES = {
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_1: (0, 2),
    T.Q5_1: (0, 2),
}


def random_blocks(rng: np.random.Generator, ggml_type: T, *shape: int) -> np.ndarray:
    """Blocks of logical `shape` with every bit pattern in their levels and moderate scales of both signs."""
    *lead, k = shape
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    if ggml_type == T.BF16:
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8).reshape(*shape, type_size)
    if block_size == 1:
        values = rng.standard_normal(shape).astype(np.float16 if type_size == 2 else np.float32)
        return values.view(np.uint8).reshape(*shape, type_size)
    blocks = rng.integers(0, 256, (*lead, k // block_size, type_size), dtype=np.uint8)
    for at in _SCALES.get(ggml_type, (0,)):
        scale = rng.uniform(0.002, 0.02, blocks.shape[:-1]) * rng.choice([-1, 1], blocks.shape[:-1])
        blocks[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return blocks


def dequantize(blocks: np.ndarray, ggml_type: T) -> np.ndarray:
    *lead, nb, type_size = blocks.shape
    rows = quants.dequantize(np.ascontiguousarray(blocks).reshape(-1, nb * type_size), ggml_type)
    return rows.reshape(*lead, -1)


def quantized_activations(x: np.ndarray, ggml_type: T) -> np.ndarray:
    """`x` as the kernels round it: int8 by 32 or 256, the largest magnitude of a group to 127."""
    group = GGML_QUANT_SIZES[ggml_type][0]
    if group == 1:
        return x
    groups = x.reshape(*x.shape[:-1], -1, group)
    top = np.abs(groups).max(-1, keepdims=True)
    inverse = np.where(top > 0, np.float32(127) / np.where(top > 0, top, np.float32(1)), np.float32(0))
    return (np.rint(groups * inverse) * (top / np.float32(127))).reshape(x.shape)


def matmul(x: np.ndarray, blocks: np.ndarray, ggml_type: T) -> tuple[np.ndarray, np.ndarray]:
    """`x @ w.T` in float64 on quantized activations, and the sum of magnitudes that bounds rounding."""
    w = dequantize(blocks, ggml_type).astype(np.float64)
    q = quantized_activations(x, ggml_type).astype(np.float64)
    return q @ np.swapaxes(w, -1, -2), np.abs(q) @ np.abs(np.swapaxes(w, -1, -2))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
