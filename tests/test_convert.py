# SPDX-License-Identifier: Apache-2.0
"""Rare types become Q8_0 with the error that is reported."""

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from ktx_jax.gguf import convert
from ktx_jax.gguf.blocks import NATIVE_TYPES
from ktx_jax.gguf.convert import CONVERTED_TYPES, to_q8_0

# The byte whose bit 6 is the top exponent bit of the block's float16 scale; cleared, the scale is below 2.
SCALE_BYTE = {T.IQ1_M: 55, T.TQ1_0: 53, T.TQ2_0: 65}


def random_blocks(ggml_type: T, lead: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*lead, GGML_QUANT_SIZES[ggml_type][1]), dtype=np.uint8)
    if ggml_type == T.MXFP4:  # an exponent
        blocks[..., 0] = rng.integers(115, 130, lead)
    elif ggml_type != T.NVFP4:  # NVFP4's scales are always finite
        blocks[..., SCALE_BYTE.get(ggml_type, 1)] &= 0xBF
    return blocks


def values(blocks: np.ndarray, ggml_type: T) -> np.ndarray:
    return gguf.quants.dequantize(blocks.reshape(-1, blocks.shape[-2] * blocks.shape[-1]), ggml_type)


@pytest.mark.parametrize("ggml_type", sorted(CONVERTED_TYPES), ids=lambda t: t.name)
def test_values_and_reported_error(ggml_type, monkeypatch):
    monkeypatch.setattr(convert, "_CHUNK", 4 * 256)  # several chunks, the last one short
    source = random_blocks(ggml_type, (3, 5, 2))
    converted, error = to_q8_0(source, ggml_type)
    block_size = GGML_QUANT_SIZES[ggml_type][0]
    assert converted.shape == (3, 5, 2 * block_size // 32, 34)
    want, got = values(source, ggml_type), values(converted, T.Q8_0)
    # Half a step of the block's largest magnitude, and float16's rounding of that step (absolute when subnormal).
    step = np.abs(want.reshape(-1, 32)).max(-1, keepdims=True) / 127
    assert (np.abs((got - want).reshape(-1, 32)) <= step * 0.501 + 127 * np.maximum(step * 2**-11, 2**-24)).all()
    exact = np.sqrt(np.square(got - want).sum(dtype=np.float64) / np.square(want).sum(dtype=np.float64))
    assert error == pytest.approx(exact, rel=1e-6)
    assert 0 <= error < 0.01


def test_all_zero():
    converted, error = to_q8_0(np.zeros((2, 1, 66), np.uint8), T.TQ2_0)
    assert not values(converted, T.Q8_0).any()
    assert error == 0.0


def test_every_type_of_gguf_py_loads():
    readable = {T.F32, T.F16}
    for ggml_type in T:
        size = GGML_QUANT_SIZES[ggml_type][1]
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), ggml_type)
        except NotImplementedError:
            continue
        readable.add(ggml_type)
    assert readable == NATIVE_TYPES | CONVERTED_TYPES


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="Q4_K is not among the types that are converted"):
        to_q8_0(np.zeros((1, 144), np.uint8), T.Q4_K)
    too_large = np.full((1, 1, 17), 0xFF, np.uint8)
    too_large[..., 0] = 250
    with pytest.raises(ValueError, match="values must be finite and within"):
        to_q8_0(too_large, T.MXFP4)
