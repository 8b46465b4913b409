# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts and dense SwiGLU on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ffi_reference import BLOCKS_OF_32, FLOATS, K_QUANTS, dequantize, quantized_activations, random_blocks, silu
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

ktx_ffi = pytest.importorskip("ktx_ffi")
pytestmark = pytest.mark.skipif(not ktx_ffi.available(), reason=ktx_ffi.why_unavailable())

# gate, up, down, F, D: as V2.5's and V2-Lite's experts, a Q8_0 file, unlike types, floats of odd width
MIXES = [
    (T.Q4_K, T.Q4_K, T.Q6_K, 512, 256),
    (T.Q4_K, T.Q4_K, T.Q5_0, 352, 512),
    (T.Q8_0, T.Q8_0, T.Q8_0, 96, 160),
    (T.Q8_0, T.Q4_K, T.Q5_1, 64, 256),
    (T.IQ4_XS, T.IQ4_XS, T.IQ4_NL, 160, 256),
    (T.F32, T.F32, T.F16, 90, 52),
]
mixes = pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(t.name for t in m[:3]))


class Experts:
    def __init__(self, mix, e, seed=0, repack=True):
        rng = np.random.default_rng(seed)
        gate, up, down, f, d = mix
        self.types = (gate, up, down)
        self.width = d
        shapes = ((e, f, d), (e, f, d), (e, d, f))
        self.raw = [random_blocks(rng, t, *s) for t, s in zip(self.types, shapes, strict=True)]
        self.weights = [ktx_ffi.Weights(b, t, repack=repack) for b, t in zip(self.raw, self.types, strict=True)]

    def __call__(self, x, ids, weights, **kwargs):
        operands = (jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights))
        return np.asarray(ktx_ffi.experts(*operands, *self.weights, **kwargs))

    def reference(self, x, ids, weights, activations=quantized_activations):
        gate, up, down = (dequantize(b, t).astype(np.float64) for b, t in zip(self.raw, self.types, strict=True))
        y = np.zeros(x.shape)
        xs = [activations(x, t).astype(np.float64) for t in self.types[:2]]
        for t in range(len(x)):
            for e, weight in zip(ids[t], weights[t], strict=True):
                if 0 <= e < len(gate):
                    h = (silu(gate[e] @ xs[0][t]) * (up[e] @ xs[1][t])).astype(np.float32)
                    y[t] += weight * (down[e] @ activations(h, self.types[2]))
        return y


def inputs(rng, tokens, width, e, k):
    x = (rng.standard_normal((tokens, width)) / np.sqrt(width)).astype(np.float32)
    ids = np.stack([rng.permutation(e)[:k] for _ in range(tokens)]).astype(np.int32)
    return x, ids, rng.random((tokens, k)).astype(np.float32)


def relative_error(y, expected):
    return np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))


@mixes
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(1, 60), seed=st.integers(0, 100))
def test_matches_numpy(mix, tokens, seed):
    experts = Experts(mix, 4, seed)
    x, ids, weights = inputs(np.random.default_rng(seed), tokens, experts.width, 4, 3)
    # A hidden value that lies on a rounding boundary may round the other way: hence not to the last bit.
    assert relative_error(experts(x, ids, weights), experts.reference(x, ids, weights)) < 3e-3


@mixes
@pytest.mark.parametrize("precise", [False, True])
def test_a_token_does_not_depend_on_its_batch(mix, precise):
    experts = Experts(mix, 5)
    x, ids, weights = inputs(np.random.default_rng(1), 90, experts.width, 5, 2)
    whole = experts(x, ids, weights, precise=precise)
    for part in (slice(0, 1), slice(3, 5), slice(10, 31), slice(50, 90)):
        np.testing.assert_array_equal(experts(x[part], ids[part], weights[part], precise=precise), whole[part])


@mixes
def test_precise_keeps_fifteen_bits(mix):
    """Nearly what activations that are not quantized give; the same where nothing is quantized."""
    experts = Experts(mix, 4)
    x, ids, weights = inputs(np.random.default_rng(4), 40, experts.width, 4, 3)
    truth = experts.reference(x, ids, weights, activations=lambda values, _: values)
    assert relative_error(experts(x, ids, weights, precise=True), truth) < 1e-4
    if mix[0] == T.F32:
        np.testing.assert_array_equal(experts(x, ids, weights, precise=True), experts(x, ids, weights))


@mixes
def test_threads_do_not_change_results(mix):
    experts = Experts(mix, 3)
    x, ids, weights = inputs(np.random.default_rng(2), 40, experts.width, 3, 2)
    before = ktx_ffi.threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            ktx_ffi.set_threads(threads)
            results += [experts(x, ids, weights), np.concatenate([experts(x[:1], ids[:1], weights[:1])] * 40)]
    finally:
        ktx_ffi.set_threads(before)
    for many, one in zip(results[::2], results[1::2], strict=True):
        np.testing.assert_array_equal(many, results[0])
        np.testing.assert_array_equal(one[0], results[0][0])


def test_ids_outside_add_nothing():
    experts = Experts(MIXES[0], 4)
    x, ids, weights = inputs(np.random.default_rng(3), 12, experts.width, 4, 3)
    ids[:, 1] = np.resize([-1, 4, 1000, -(2**31)], 12)
    kept = weights.copy()
    kept[:, 1] = 0
    expected = experts.reference(x, np.where(kept > 0, ids, 0), kept)
    assert relative_error(experts(x, ids, weights), expected) < 3e-3
    np.testing.assert_array_equal(experts(x, np.full_like(ids, -1), weights), 0)


def test_shards_of_experts_and_rows_add_up():
    experts = Experts(MIXES[0], 4)
    x, ids, weights = inputs(np.random.default_rng(4), 9, experts.width, 4, 2)
    total = 0.0
    for shard in (slice(0, 2), slice(2, 4)):
        local = [ktx_ffi.Weights(b[shard], t) for b, t in zip(experts.raw, experts.types, strict=True)]
        total += np.asarray(ktx_ffi.experts(*map(jnp.asarray, (x, ids - shard.start, weights)), *local))
    np.testing.assert_allclose(total, experts(x, ids, weights), rtol=1e-4, atol=1e-5)
    total = 0.0
    for rows, blocks in ((slice(0, 256), slice(0, 1)), (slice(256, 512), slice(1, 2))):  # of gate and up; of down
        gate, up, down = experts.raw
        cut = [gate[:, rows], up[:, rows], down[:, :, blocks]]
        local = [ktx_ffi.Weights(b, t) for b, t in zip(cut, experts.types, strict=True)]
        total += np.asarray(ktx_ffi.experts(*map(jnp.asarray, (x, ids, weights)), *local))
    np.testing.assert_allclose(total, experts(x, ids, weights), rtol=1e-4, atol=1e-5)


# A piece of a width whose cuts fall inside blocks of `down`: its type, F, K, where the hidden values lie.
PLACES = [(t, 192, 512, at) for t in K_QUANTS for at in (0, 128, 256, 320)]
PLACES += [(t, 96, 256, 32) for t in BLOCKS_OF_32 + FLOATS] + [(T.Q6_K, 80, 256, 176), (T.F16, 50, 90, 16)]


@pytest.mark.parametrize(("down", "f", "k", "at"), PLACES, ids=lambda v: getattr(v, "name", str(v)))
@pytest.mark.parametrize("tokens", [1, 60])
def test_hidden_values_inside_a_wider_down(down, f, k, at, tokens):
    """As the same experts with gate and up filled with zeros to the width of `down`."""
    rng = np.random.default_rng(at)
    gate, up = random_blocks(rng, T.Q4_K, 4, f, 256), random_blocks(rng, T.Q4_K, 4, f, 256)
    last = random_blocks(rng, down, 4, 256, k)
    filled = [np.zeros((4, k, *w.shape[2:]), np.uint8) for w in (gate, up)]
    for wide, w in zip(filled, (gate, up), strict=True):
        wide[:, at : at + f] = w
    narrow = [ktx_ffi.Weights(w, t) for w, t in ((gate, T.Q4_K), (up, T.Q4_K), (last, down))]
    wide = [ktx_ffi.Weights(w, t) for w, t in ((filled[0], T.Q4_K), (filled[1], T.Q4_K), (last, down))]
    operands = tuple(map(jnp.asarray, inputs(rng, tokens, 256, 4, 2)))
    placed = jax.jit(lambda offset: ktx_ffi.experts(*operands, *narrow, offset=offset))
    expected = np.asarray(ktx_ffi.experts(*operands, *wide))
    np.testing.assert_array_equal(placed(np.int32(at)), expected)
    np.testing.assert_array_equal(placed(jnp.full((1,), at, jnp.int32)), expected)
    dense = [ktx_ffi.Weights(w[1], t) for w, t in ((gate, T.Q4_K), (up, T.Q4_K), (last, down))]
    one = (operands[0], jnp.ones((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32))
    np.testing.assert_array_equal(ktx_ffi.mlp(operands[0], *dense, offset=at), np.asarray(ktx_ffi.experts(*one, *wide)))


def test_places_outside_are_errors():
    rng = np.random.default_rng(0)
    shapes = (T.Q4_K, (2, 96, 256)), (T.Q4_K, (2, 96, 256)), (T.Q6_K, (2, 256, 256))
    weights = [ktx_ffi.Weights(random_blocks(rng, t, *shape), t) for t, shape in shapes]
    operands = tuple(map(jnp.asarray, inputs(rng, 3, 256, 2, 2)))
    for offset in (-16, 8, 176, 1 << 30):
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"ktx_experts: offset {offset} must be a multiple of 16"):
            ktx_ffi.experts(*operands, *weights, offset=offset).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"down \[E, D, F\]"):
        ktx_ffi.experts(*operands, *weights).block_until_ready()


@mixes
def test_without_repacking_results_are_the_same(mix):
    x, ids, weights = inputs(np.random.default_rng(5), 21, mix[4], 3, 2)
    mapped = Experts(mix, 3, repack=False)
    np.testing.assert_array_equal(mapped(x, ids, weights), Experts(mix, 3)(x, ids, weights))


def test_dense_mlp_and_bfloat16():
    experts = Experts(MIXES[1], 1)
    dense = [ktx_ffi.Weights(b[0], t) for b, t in zip(experts.raw, experts.types, strict=True)]
    x = np.random.default_rng(6).standard_normal((2, 20, experts.width)).astype(np.float32)
    y = np.asarray(ktx_ffi.mlp(jnp.asarray(x), *dense))
    rows = x.reshape(40, -1)
    expected = experts.reference(rows, np.zeros((40, 1), np.int32), np.ones((40, 1), np.float32))
    assert relative_error(y.reshape(40, -1), expected) < 3e-3
    half = jnp.asarray(x, jnp.bfloat16)
    full = ktx_ffi.mlp(half.astype(jnp.float32), *dense)
    assert ktx_ffi.mlp(half, *dense).dtype == jnp.bfloat16
    np.testing.assert_array_equal(ktx_ffi.mlp(half, *dense), full.astype(jnp.bfloat16))
