# SPDX-License-Identifier: Apache-2.0
"""Quantizers: their blocks are read by gguf-py and by our own reader, with the error the formats promise."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ktx_jax.gguf.blocks import dequantize
from ktx_jax.gguf.quantize import QUANTIZABLE_TYPES, quantize

# RMS error on Gaussian values, in units of their standard deviation.
GAUSSIAN_ERROR = {
    T.F32: 0.0,
    T.F16: 0.0003,
    T.BF16: 0.002,
    T.Q8_0: 0.006,
    T.Q6_K: 0.018,
    T.Q5_1: 0.036,
    T.Q5_K: 0.038,
    T.Q5_0: 0.043,
    T.Q4_1: 0.073,
    T.Q4_K: 0.075,
    T.IQ4_NL: 0.076,
    T.IQ4_XS: 0.077,
    T.Q4_0: 0.084,
}
TYPES = sorted(QUANTIZABLE_TYPES)


def by_gguf_py(blocks: np.ndarray, ggml_type: T) -> np.ndarray:
    *lead, nb, ts = blocks.shape
    rows = blocks.reshape(-1, nb * ts)
    return gguf.quants.dequantize(rows, ggml_type).reshape(*lead, -1)


def relative_error(x: np.ndarray, ggml_type: T) -> float:
    error = by_gguf_py(quantize(x, ggml_type), ggml_type).reshape(x.shape) - x
    return float(np.sqrt(np.mean(np.square(error)) / np.mean(np.square(x))))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_error_on_gaussian_values(ggml_type):
    x = np.random.default_rng(0).standard_normal((128, 1024), np.float32) * 0.02
    assert relative_error(x, ggml_type) <= GAUSSIAN_ERROR[ggml_type]


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_error_on_heavy_tails_and_offsets(ggml_type):
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, (64, 1024)).astype(np.float32)
    assert relative_error(x, ggml_type) <= 2 * GAUSSIAN_ERROR[ggml_type]
    if ggml_type in (T.Q4_1, T.Q5_1, T.Q4_K, T.Q5_K):
        for sign in (1, -1):
            assert relative_error(sign * np.abs(x), ggml_type) <= 2 * GAUSSIAN_ERROR[ggml_type]


@pytest.mark.parametrize("ggml_type", [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0], ids=lambda t: t.name)
def test_no_worse_than_gguf_py(ggml_type):
    x = np.random.default_rng(2).standard_normal((64, 512), np.float32)
    theirs = by_gguf_py(gguf.quants.quantize(x, ggml_type).reshape(64, 16, -1), ggml_type)
    ours = by_gguf_py(quantize(x, ggml_type), ggml_type)
    assert np.square(ours - x).mean() <= np.square(theirs - x).mean() * 1.0001


@pytest.mark.parametrize("ggml_type", [T.F16, T.BF16], ids=lambda t: t.name)
def test_floats_round_as_gguf_py(ggml_type):
    x = np.random.default_rng(3).standard_normal((4, 256), np.float32)
    want = gguf.quants.quantize(x, ggml_type).view(np.uint8).reshape(4, 256, 2)
    np.testing.assert_array_equal(quantize(x, ggml_type), want)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_any_finite_values(ggml_type):
    """Constant, zero, tiny, huge and mixed blocks: finite results, errors within the block's range."""
    block = GGML_QUANT_SIZES[ggml_type][0]
    # Super-blocks keep their scale in float16, whose steps are 2**-24, and multiply it by up to 127 * 32: values too
    # small for that are lost, in any quantizer.
    lost = 2.0**-25 * 127 * 32 if block == 256 else 1e-6

    @settings(max_examples=30, deadline=None)
    @given(arrays(np.float32, (2, max(block, 32)), elements=st.floats(-60000, 60000, width=32)))
    def holds(x):
        blocks = quantize(x, ggml_type)
        values = by_gguf_py(blocks, ggml_type).reshape(x.shape)
        assert np.isfinite(values).all()
        assert np.abs(values - x).max() <= 0.6 * np.abs(x).max() + lost
        np.testing.assert_array_equal(np.asarray(dequantize(jnp.asarray(blocks), ggml_type)), values)

    holds()


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_zeros_stay_zero_and_tiny_values_do_not_warn(ggml_type):
    zeros = np.zeros((3, 512), np.float32)
    assert not by_gguf_py(quantize(zeros, ggml_type), ggml_type).any()
    tiny = np.full((1, 256), 1e-42, np.float32)
    assert np.isfinite(by_gguf_py(quantize(tiny, ggml_type), ggml_type)).all()


def test_chunks_do_not_change_the_result():
    x = np.random.default_rng(4).standard_normal((3, 700, 768), np.float32)
    whole = quantize(x, T.Q4_K)
    assert whole.shape == (3, 700, 3, 144)
    np.testing.assert_array_equal(whole[2, 650:], quantize(x[2, 650:], T.Q4_K))


def test_errors_say_what_is_wrong():
    x = np.zeros((2, 100), np.float32)
    with pytest.raises(ValueError, match=r"Q4_K needs rows of a multiple of 256; got shape \(2, 100\)"):
        quantize(x, T.Q4_K)
    with pytest.raises(ValueError, match="no quantizer for Q2_K; there is one for BF16"):
        quantize(x, T.Q2_K)
    with pytest.raises(ValueError, match="Q8_0: values must be finite"):
        quantize(np.full((1, 32), np.nan, np.float32), T.Q8_0)
    with pytest.raises(ValueError, match="F16: values must be finite"):
        quantize(np.full((1, 32), 1e6, np.float32), T.F16)
