# SPDX-License-Identifier: Apache-2.0
"""The exact operations against plain NumPy in float64, at odd sizes and with tiles that do not divide them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax import ops
from ktx_jax.gguf.blocks import NATIVE_TYPES
from ktx_jax.gguf.quantize import QUANTIZABLE_TYPES, quantize
from ktx_jax.quantized import QuantizedArray

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Where the float16 scales of the types lie that are not quantized to here.
SCALES = {T.Q2_K: (80, 82), T.Q3_K: (108,)}


def weight(seed: int, shape: tuple[int, ...], kind: T = T.Q8_0) -> tuple[QuantizedArray, np.ndarray]:
    """A random quantized weight, and its values by gguf-py."""
    rng = np.random.default_rng(seed)
    if kind in QUANTIZABLE_TYPES:
        blocks = quantize(rng.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5, kind)
    else:
        size, nbytes = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, nbytes), dtype=np.uint8)
        for at in SCALES[kind]:
            blocks[..., at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    values = quants.dequantize(blocks.reshape(*shape[:-1], -1), kind)
    return QuantizedArray(jnp.asarray(blocks), kind), np.float64(values.reshape(shape))


def activations(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 rows of 256."""
    monkeypatch.setattr(sys.modules["ktx_jax.ops.matmul"], "_TILE_VALUES", 2048)  # the package's name is the function


@pytest.mark.parametrize("kind", sorted(NATIVE_TYPES), ids=lambda kind: kind.name)
def test_matmul_of_every_type(kind, small_tiles):
    w, values = weight(0, (23, 256), kind)  # two tiles and a rest of 7
    x = activations(1, 3, 256)
    np.testing.assert_allclose(jax.jit(ops.matmul)(x, w), x @ values.T, **CLOSE)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("tokens", [1, 5])
def test_matmul_sizes(rows, tokens, small_tiles):
    w, values = weight(rows, (rows, 256), T.Q4_0)
    x = activations(tokens, tokens, 256)
    out = jax.jit(ops.matmul)(x, w)
    np.testing.assert_allclose(out, x @ values.T, **CLOSE)
    np.testing.assert_allclose(ops.matmul(jnp.asarray(x), jnp.asarray(values, jnp.float32)), out, **CLOSE)


def test_matmul_types(small_tiles):
    w, values = weight(0, (23, 256))
    x = jnp.asarray(activations(1, 3, 256), jnp.bfloat16)
    half, full = ops.matmul(x, w), ops.matmul(x, w, dtype=jnp.float32)
    assert (half.dtype, full.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(full, np.float64(x) @ values.T, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


def test_matmul_gradient(small_tiles):
    w, values = weight(0, (23, 256))
    grad = jax.grad(lambda x: (ops.matmul(x, w) ** 2).sum())(jnp.asarray(activations(1, 3, 256)))
    np.testing.assert_allclose(grad, 2 * activations(1, 3, 256) @ values.T @ values, rtol=1e-4, atol=1e-4)


def test_a_large_weight_is_never_dequantized_whole():
    """The vocabulary's product: 0.8 GB as float32, and V2-Lite's largest."""
    x = jax.ShapeDtypeStruct((4, 2048), jnp.float32)
    w = QuantizedArray(jax.ShapeDtypeStruct((102400, 8, 210), jnp.uint8), T.Q6_K)
    memory = jax.jit(ops.matmul).lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 << 20


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_head_matmul(tokens, transposed):
    x = activations(0, tokens, 3, 64)
    w, values = weight(1, (3, 64, 32) if transposed else (3, 33, 64), T.Q5_0)
    expected = np.einsum("thk,hkn->thn" if transposed else "thk,hnk->thn", x, values)
    for each in (w, jnp.asarray(values, jnp.float32)):
        out = jax.jit(ops.head_matmul, static_argnames="transposed")(x, each, transposed=transposed)
        np.testing.assert_allclose(out, expected, **CLOSE)


@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 511, 512, 513, 1024, 1300]),
    st.sampled_from([1, 3, 1000]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_largest_is_the_first_of_the_largest(rows, size, values, seed):
    """Few values: many are equal to the largest, in several windows."""
    x = np.random.default_rng(seed).integers(0, values, (2, rows, size)).astype(np.float32)
    x[0, 0] = -np.inf
    value, place = jax.jit(ops.largest)(x)
    np.testing.assert_array_equal(value, x.max(-1))
    np.testing.assert_array_equal(place, x.argmax(-1))


def test_embedding_rows():
    w, values = weight(0, (50, 64), T.Q4_1)
    ids = jnp.asarray([49, 0, 7, 7])
    rows = jax.jit(ops.embedding_rows, static_argnames="dtype")
    for each in (w, jnp.asarray(values, jnp.float32)):
        np.testing.assert_array_equal(rows(each, ids, dtype=jnp.float32), values[ids])
        np.testing.assert_array_equal(rows(each, ids, dtype=jnp.bfloat16), jnp.asarray(values[ids], jnp.bfloat16))


def silu(x):
    return x / (1 + np.exp(-x))


def test_swiglu():
    x = activations(0, 3, 64)
    (g, gate), (u, up), (d, down) = weight(1, (33, 64)), weight(2, (33, 64), T.Q4_0), weight(3, (64, 32), T.F16)
    expected = (silu(x @ gate[:32].T) * (x @ up[:32].T)) @ down.T
    cut = [QuantizedArray(w.data[:32], w.ggml_type) for w in (g, u)]
    np.testing.assert_allclose(ops.swiglu(jnp.asarray(x), *cut, d), expected, **CLOSE)


EXPERTS, WIDTH, SIZE, SLOTS = 5, 32, 64, 3


@pytest.fixture(scope="module")
def stacks():
    shapes = {"gate": (EXPERTS, WIDTH, SIZE), "up": (EXPERTS, WIDTH, SIZE), "down": (EXPERTS, SIZE, WIDTH)}
    kinds = (T.Q4_0, T.Q5_1, T.Q8_0)
    return [weight(i, shape, kind) for i, (shape, kind) in enumerate(zip(shapes.values(), kinds, strict=True))]


def mix_experts(x, ids, shares, gate, up, down):
    """Each token's experts one by one."""
    out = np.zeros(x.shape)
    for token, slot in np.ndindex(ids.shape):
        if 0 <= (e := ids[token, slot]) < len(gate):
            hidden = silu(x[token] @ gate[e].T) * (x[token] @ up[e].T)
            out[token] += shares[token, slot] * (hidden @ down[e].T)
    return out


run_experts = jax.jit(ops.experts)


@pytest.mark.parametrize("choice", ["spread", "one", "none", "padded"])
@pytest.mark.parametrize("tokens", [1, 6, 71])
def test_experts(stacks, tokens, choice):
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(EXPERTS)[:SLOTS] for _ in range(tokens)])
    if choice == "one":  # every token's every slot: the longest run of one expert
        ids[:] = 3
    elif choice == "none":
        ids[:] = -1
    elif choice == "padded":
        ids[rng.random(ids.shape) < 0.4] = -1
        ids[0, 0] = EXPERTS
    x, shares = activations(1, tokens, SIZE), rng.random((tokens, SLOTS), np.float32)
    expected = mix_experts(x, ids, shares, *(values for _, values in stacks))
    out = run_experts(x, ids, shares, *(w for w, _ in stacks))
    np.testing.assert_allclose(out, expected, **CLOSE)
    dense = run_experts(x, ids, shares, *(jnp.asarray(values, jnp.float32) for _, values in stacks))
    np.testing.assert_allclose(dense, expected, **CLOSE)


def test_a_token_s_experts_do_not_depend_on_other_tokens(stacks):
    rng = np.random.default_rng(0)
    ids, shares = rng.integers(0, EXPERTS, (6, SLOTS)), rng.random((6, SLOTS), np.float32)
    x = activations(1, 6, SIZE)
    others = ids.copy()
    others[1:] = rng.integers(-1, EXPERTS, (5, SLOTS))
    first = [run_experts(x, i, shares, *(w for w, _ in stacks))[0] for i in (ids, others)]
    np.testing.assert_array_equal(*first)


HEADS, RANK, ROPE, PAGE, BLOCKS = 3, 24, 8, 16, 40  # 640 positions: two steps of the softmax, the second not full


def attend(q, rows, position, scale):
    """One token's attention to rows 0..position."""
    scores = scale * q @ rows[: position + 1].T
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ rows[: position + 1, :RANK]


@pytest.mark.parametrize("bits", [False, True], ids=["float32", "bfloat16 bits"])
@pytest.mark.parametrize("tile", [1, 4])
def test_mla_attention(tile, bits):
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((90, PAGE, RANK + ROPE)).astype(np.float32)
    pages = np.float32(jnp.asarray(pages, jnp.bfloat16)) if bits else pages
    table = rng.permutation(90)[: 2 * BLOCKS].reshape(2, BLOCKS)
    # Tiles of one sequence each, at far apart places, the last two cut short by padding.
    positions = np.array([0, 1, 2, 3, 637, 638, 639, -1, 511, 512, -1, -1], np.int32)
    sequence = np.array([0] * 4 + [1] * 4 + [0] * 4, np.int32)
    q_latent, q_rope = activations(1, 12, HEADS, RANK), activations(2, 12, HEADS, ROPE)
    kept = jax.lax.bitcast_convert_type(jnp.asarray(pages, jnp.bfloat16), jnp.uint16) if bits else jnp.asarray(pages)
    attention = jax.jit(ops.mla_attention, static_argnames=("scale", "tile"))
    out = attention(q_latent, q_rope, kept, table, sequence, positions, scale=0.3, tile=tile)
    assert np.isfinite(out).all()
    queries, live = np.concatenate([q_latent, q_rope], axis=-1).astype(np.float64), positions >= 0
    rows = np.float64(pages[table].reshape(2, BLOCKS * PAGE, -1))
    expected = [attend(queries[t], rows[sequence[t]], positions[t], 0.3) for t in np.flatnonzero(live)]
    np.testing.assert_allclose(out[live], expected, **CLOSE)
