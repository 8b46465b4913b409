# SPDX-License-Identifier: Apache-2.0
"""Block formats against gguf-py: every byte pattern, jitted or not, must give the same bits."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ktx_jax.gguf.blocks import NATIVE_TYPES, dequantize
from ktx_jax.quantized import QuantizedArray

# Byte offsets of the float16 fields of each format.
F16_FIELDS = {
    T.F16: (0,),
    T.Q4_0: (0,),
    T.Q4_1: (0, 2),
    T.Q5_0: (0,),
    T.Q5_1: (0, 2),
    T.Q8_0: (0,),
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.IQ4_NL: (0,),
    T.IQ4_XS: (0,),
}
TYPES = sorted(NATIVE_TYPES)


def finite(blocks: np.ndarray, ggml_type: T) -> np.ndarray:
    """Clears one exponent bit of every float16 field (or float) that would be an infinity or a NaN."""
    blocks = blocks.copy()
    high = {T.F32: (3,), T.BF16: (1,)}.get(ggml_type) or tuple(at + 1 for at in F16_FIELDS[ggml_type])
    for at in high:
        blocks[..., at] &= 0xBF
    return blocks


def random_blocks(ggml_type: T, lead: tuple[int, ...], seed: int = 0) -> np.ndarray:
    shape = (*lead, GGML_QUANT_SIZES[ggml_type][1])
    return finite(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), ggml_type)


def reference(blocks: np.ndarray, ggml_type: T) -> np.ndarray:
    *lead, nb, ts = blocks.shape
    rows = np.ascontiguousarray(blocks).reshape(-1, nb * ts)
    return gguf.quants.dequantize(rows, ggml_type).reshape(*lead, nb * GGML_QUANT_SIZES[ggml_type][0])


def assert_same_bits(got: jax.Array, want: np.ndarray) -> None:
    got_np = np.asarray(got)
    assert got_np.dtype == np.float32
    np.testing.assert_array_equal(got_np.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("lead", [(2,), (3, 5), (2, 3, 7)], ids=str)
def test_equals_gguf_py(ggml_type, lead):
    blocks = random_blocks(ggml_type, lead)
    want = reference(blocks, ggml_type)
    assert_same_bits(dequantize(jnp.asarray(blocks), ggml_type), want)
    assert_same_bits(jax.jit(dequantize, static_argnums=1)(jnp.asarray(blocks), ggml_type), want)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_equals_gguf_py_on_any_bytes(ggml_type):
    run = jax.jit(dequantize, static_argnums=1)
    type_size = GGML_QUANT_SIZES[ggml_type][1]

    @settings(max_examples=40, deadline=None)
    @given(arrays(np.uint8, (3, 2, type_size), elements=st.integers(0, 255)))
    def holds(raw):
        blocks = finite(raw, ggml_type)
        assert_same_bits(run(jnp.asarray(blocks), ggml_type), reference(blocks, ggml_type))

    holds()


@pytest.mark.parametrize("ggml_type", sorted(F16_FIELDS), ids=lambda t: t.name)
def test_every_finite_float16_scale(ggml_type):
    """Subnormal scales too: neither flushed nor rounded."""
    scales = np.arange(1 << 16, dtype=np.uint16)
    scales = scales[(scales & 0x7C00) != 0x7C00]
    blocks = random_blocks(ggml_type, (len(scales) // 16, 16), seed=1)
    for at in F16_FIELDS[ggml_type]:
        blocks[..., at : at + 2] = scales.reshape(-1, 16, 1).view(np.uint8)
    got = jax.jit(dequantize, static_argnums=1)(jnp.asarray(blocks), ggml_type)
    assert_same_bits(got, reference(blocks, ggml_type))


@pytest.mark.parametrize("ggml_type", [T.F32, T.BF16], ids=lambda t: t.name)
def test_subnormal_floats_survive(ggml_type):
    blocks = np.zeros((2, 128, GGML_QUANT_SIZES[ggml_type][1]), np.uint8)
    blocks[..., -2] = np.arange(128)
    blocks[1, :, -1] = 0x80
    got = jax.jit(dequantize, static_argnums=1)(jnp.asarray(blocks), ggml_type)
    assert_same_bits(got, reference(blocks, ggml_type))


def test_dtype_is_cast_last():
    blocks = random_blocks(T.Q6_K, (4, 2))
    want = jnp.asarray(reference(blocks, T.Q6_K)).astype(jnp.bfloat16)
    got = dequantize(jnp.asarray(blocks), T.Q6_K, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert (got == want).all()


def test_wrong_type_and_wrong_block_are_named():
    with pytest.raises(ValueError, match="IQ2_S blocks are not dequantized in the step"):
        dequantize(jnp.zeros((1, 82), jnp.uint8), T.IQ2_S)
    with pytest.raises(ValueError, match=r"Q4_K blocks have 144 bytes.*has 210"):
        dequantize(jnp.zeros((1, 210), jnp.uint8), T.Q4_K)


def test_one_fused_loop_for_the_k_quants():
    """No temporary the size of the weight beside the result."""
    for ggml_type in (T.Q4_K, T.Q6_K):
        spec = jax.ShapeDtypeStruct((64, 8, GGML_QUANT_SIZES[ggml_type][1]), jnp.uint8)
        compiled = jax.jit(dequantize, static_argnums=1).lower(spec, ggml_type).compile()
        analysis = compiled.memory_analysis()
        assert analysis is None or analysis.temp_size_in_bytes < 64 * 2048


# --- QuantizedArray ---


def weight(ggml_type: T = T.Q4_K, lead: tuple[int, ...] = (8, 16), nb: int = 2) -> QuantizedArray:
    return QuantizedArray(jnp.asarray(random_blocks(ggml_type, (*lead, nb))), ggml_type)


def test_logical_shape():
    w = weight()
    assert w.shape == (8, 16, 512)
    assert w.ndim == 3
    assert w.nbytes == 8 * 16 * 2 * 144
    assert weight(T.F32, (), nb=7).shape == (7,)


def test_survives_transformations():
    w = weight()
    want = w.dequantize()
    assert (jax.jit(lambda w: w.dequantize())(w) == want).all()
    assert (jax.vmap(lambda w: w.dequantize())(w) == want).all()
    assert (jax.lax.map(lambda w: w.dequantize(), w) == want).all()
    assert jax.eval_shape(lambda w: w.dequantize(jnp.bfloat16), w).shape == w.shape
    abstract = jax.eval_shape(lambda: w)
    assert abstract.shape == w.shape
    assert abstract.nbytes == w.nbytes
    assert jax.tree.leaves(jax.tree.map(lambda leaf: "placeholder", w)) == ["placeholder"]


def test_shape_inside_shard_map_is_the_shard():
    w = weight()
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    seen = []

    def local(w: QuantizedArray) -> jax.Array:
        seen.append(w.shape)
        return w.dequantize()

    placed = jax.device_put(w, NamedSharding(mesh, P("expert")))
    got = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))(placed)
    assert seen[0] == w.shape
    assert (got == w.dequantize()).all()


def test_take_gathers_rows():
    w = weight()
    rows = jnp.array([[5, 0], [7, 5]])
    got = jax.jit(lambda w, i: w.take(i))(w, rows)
    assert got.shape == (2, 2, 16, 512)
    assert (got.dequantize() == w.dequantize()[rows]).all()
    with pytest.raises(ValueError, match="none"):
        weight(T.F32, (), nb=7).take(jnp.array([0]))


def test_tiles_of_a_loop_stay_vectorized():
    """In a loop over tiles, the format is read by a function of its own, from a plain buffer: see `_read_apart`."""
    w = weight(T.Q4_K, (4, 64), nb=8)
    tiles = jax.jit(lambda w: jax.lax.map(lambda tile: tile.dequantize().sum(), w))
    text = tiles.lower(w).compile().as_text()
    assert 'inlineable="false"' in text
    assert " call(" in text


def test_gradient_of_activations_and_checkpoint():
    w = weight(T.Q5_0, (16,), nb=2)
    loss = jax.checkpoint(lambda x: jnp.sum(jnp.square(w.dequantize() @ x)))
    dense = w.dequantize()
    x = jnp.linspace(0.0, 1.0, 64)
    want = jax.grad(lambda x: jnp.sum(jnp.square(dense @ x)))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), want, rtol=1e-5)


def test_other_platforms_lower_without_the_boundary():
    spec = jax.ShapeDtypeStruct((4, 8, 144), jnp.uint8)
    export = jax.export.export(jax.jit(lambda b: dequantize(b, T.Q4_K)), platforms=["cuda"])(spec)
    assert "inlineable" not in export.mlir_module()
