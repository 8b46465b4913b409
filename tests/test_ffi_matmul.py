# SPDX-License-Identifier: Apache-2.0
"""Quantized matmul on CPU: every type, odd shapes, batch and thread invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ffi_reference import BLOCKS_OF_32, FLOATS, TYPES, dequantize, matmul, random_blocks
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

ktx_ffi = pytest.importorskip("ktx_ffi")
pytestmark = pytest.mark.skipif(not ktx_ffi.available(), reason=ktx_ffi.why_unavailable())

types = pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)


def widths(ggml_type, blocks):
    return blocks * max(GGML_QUANT_SIZES[ggml_type][0], 1) if ggml_type not in FLOATS else 37 * blocks + 1


def run(x, w, n, **kwargs):
    return np.asarray(ktx_ffi.matmul(jnp.asarray(x), w, n, **kwargs))


@types
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 40), n=st.integers(1, 70), blocks=st.integers(1, 5), seed=st.integers(0, 1000))
def test_matches_numpy_on_the_same_activations(ggml_type, rows, n, blocks, seed):
    rng = np.random.default_rng(seed)
    raw = random_blocks(rng, ggml_type, n, widths(ggml_type, blocks))
    x = rng.standard_normal((rows, widths(ggml_type, blocks))).astype(np.float32)
    y = run(x, ktx_ffi.Weights(raw, ggml_type), n)
    expected, magnitude = matmul(x, raw, ggml_type)
    np.testing.assert_array_less(np.abs(y - expected), 2e-6 * magnitude + 1e-30)


@types
def test_is_near_float_values(ggml_type):
    rng = np.random.default_rng(1)
    k = widths(ggml_type, 8)
    raw = random_blocks(rng, ggml_type, 64, k)
    x = rng.standard_normal((9, k)).astype(np.float32)
    y = run(x, ktx_ffi.Weights(raw, ggml_type), 64)
    expected = x.astype(np.float64) @ dequantize(raw, ggml_type).T
    error = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
    assert error < (1e-6 if ggml_type in FLOATS else 0.01)


@types
def test_a_row_does_not_depend_on_its_batch(ggml_type):
    rng = np.random.default_rng(2)
    k = widths(ggml_type, 3)
    w = ktx_ffi.Weights(random_blocks(rng, ggml_type, 50, k), ggml_type)
    x = rng.standard_normal((67, k)).astype(np.float32)
    whole = run(x, w, 50)
    for rows in (1, 2, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 33):
        np.testing.assert_array_equal(run(x[:rows], w, 50), whole[:rows])
    np.testing.assert_array_equal(run(x[40:41], w, 50), whole[40:41])


@types
def test_without_repacking_results_are_the_same(ggml_type):
    rng = np.random.default_rng(3)
    k = widths(ggml_type, 3)
    raw = random_blocks(rng, ggml_type, 45, k)
    x = rng.standard_normal((18, k)).astype(np.float32)
    mapped = ktx_ffi.Weights(raw, ggml_type, repack=False)
    np.testing.assert_array_equal(run(x, mapped, 45), run(x, ktx_ffi.Weights(raw, ggml_type), 45))


@pytest.mark.parametrize("ggml_type", [T.Q4_K, T.Q5_0, T.F32], ids=lambda t: t.name)
def test_threads_do_not_change_results(ggml_type):
    rng = np.random.default_rng(4)
    k = widths(ggml_type, 4)
    w = ktx_ffi.Weights(random_blocks(rng, ggml_type, 300, k), ggml_type)
    x = rng.standard_normal((150, k)).astype(np.float32)
    before = ktx_ffi.threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            ktx_ffi.set_threads(threads)
            assert ktx_ffi.threads() == threads
            results.append(run(x, w, 300))
    finally:
        ktx_ffi.set_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("ggml_type", [T.Q4_K, T.Q8_0, T.F16], ids=lambda t: t.name)
def test_leading_axis(ggml_type):
    rng = np.random.default_rng(5)
    k = widths(ggml_type, 2)
    raw = random_blocks(rng, ggml_type, 5, 33, k)
    x = rng.standard_normal((19, 5, k)).astype(np.float32)
    y = np.asarray(ktx_ffi.batched_matmul(jnp.asarray(x), ktx_ffi.Weights(raw, ggml_type), 33))
    for h in range(5):
        np.testing.assert_array_equal(y[:, h], run(x[:, h], ktx_ffi.Weights(raw[h], ggml_type), 33))


@pytest.mark.parametrize("ggml_type", [T.Q6_K, T.Q5_0, T.BF16], ids=lambda t: t.name)
def test_slices_of_rows_blocks_and_leading_axes(ggml_type):
    rng = np.random.default_rng(6)
    k = widths(ggml_type, 6)
    raw = random_blocks(rng, ggml_type, 3, 40, k)
    part = raw[1:, 7:31, 2:5]
    x = rng.standard_normal((4, 2, part.shape[-2] * GGML_QUANT_SIZES[ggml_type][0])).astype(np.float32)
    for repack in (True, False):
        cut = ktx_ffi.Weights(part, ggml_type, repack=repack)
        copy = ktx_ffi.Weights(part.copy(), ggml_type)
        assert cut.shape == (2, 24, x.shape[-1])
        y = ktx_ffi.batched_matmul(jnp.asarray(x), cut, 24)
        np.testing.assert_array_equal(y, ktx_ffi.batched_matmul(jnp.asarray(x), copy, 24))


@pytest.mark.parametrize("ggml_type", [T.Q4_K, T.Q8_0, T.F32], ids=lambda t: t.name)
def test_bfloat16_in_and_out(ggml_type):
    rng = np.random.default_rng(7)
    k = widths(ggml_type, 2)
    w = ktx_ffi.Weights(random_blocks(rng, ggml_type, 20, k), ggml_type)
    x = jnp.asarray(rng.standard_normal((5, k)), jnp.bfloat16)
    y = ktx_ffi.matmul(x, w, 20, dtype=jnp.float32)
    np.testing.assert_array_equal(y, ktx_ffi.matmul(x.astype(jnp.float32), w, 20))
    rounded = ktx_ffi.matmul(x, w, 20)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, y.astype(jnp.bfloat16))


@pytest.mark.parametrize("ggml_type", [*BLOCKS_OF_32, T.Q4_K, T.Q6_K], ids=lambda t: t.name)
def test_extreme_activations(ggml_type):
    rng = np.random.default_rng(8)
    k = widths(ggml_type, 2)
    w = ktx_ffi.Weights(random_blocks(rng, ggml_type, 16, k), ggml_type)
    x = rng.standard_normal((6, k)).astype(np.float32)
    x[1] = 0
    x[2, 3] = np.nan
    x[3, 5] = np.inf
    x[4] *= 1e30
    x[5] *= 1e-30
    y = run(x, w, 16)
    np.testing.assert_array_equal(y[1], 0)
    assert np.isnan(y[2]).all()
    assert np.isnan(y[3]).all()
    assert np.isfinite(y[[0, 4, 5]]).all()
    np.testing.assert_array_equal(y[:1], run(x[:1], w, 16))


def test_under_jit_the_handle_is_an_operand():
    rng = np.random.default_rng(9)
    ws = [ktx_ffi.Weights(random_blocks(rng, T.Q8_0, 24, 64), T.Q8_0) for _ in range(2)]
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    traces = []

    @jax.jit
    def f(x, handle):
        traces.append(1)
        return ktx_ffi.matmul(x, handle, 24)

    for w in ws:
        np.testing.assert_array_equal(f(x, w.operand), ktx_ffi.matmul(x, w, 24))
    assert len(traces) == 1


@pytest.mark.parametrize("ggml_type", [T.Q4_K, T.Q6_K, T.Q5_0, T.Q8_0], ids=lambda t: t.name)
def test_precise_keeps_fifteen_bits(ggml_type):
    """Nearly float32's own result, and the same to the bit for any number of rows."""
    rng = np.random.default_rng(5)
    raw = random_blocks(rng, ggml_type, 40, 512)
    x = rng.standard_normal((19, 512)).astype(np.float32)
    truth = x.astype(np.float64) @ dequantize(raw, ggml_type).T.astype(np.float64)
    w = ktx_ffi.Weights(raw, ggml_type)
    rough, fine = run(x, w, 40), run(x, w, 40, precise=True)
    assert np.linalg.norm(fine - truth) < np.linalg.norm(rough - truth) / 50
    np.testing.assert_array_equal(run(x[:1], w, 40, precise=True), fine[:1])
