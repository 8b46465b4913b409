# SPDX-License-Identifier: Apache-2.0
"""MLA attention over a paged latent cache, on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ktx_ffi = pytest.importorskip("ktx_ffi")
pytestmark = pytest.mark.skipif(not ktx_ffi.available(), reason=ktx_ffi.why_unavailable())

# A ValueError where JAX ran the call asynchronously and the result is used.
ERROR = (jax.errors.JaxRuntimeError, ValueError)


def to_bits(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).view(np.uint16)


def from_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Case:
    """Ragged tokens of several sequences over random pages."""

    def __init__(self, seed, tokens, heads, latent, rope, page, lengths, bits):
        rng = np.random.default_rng(seed)
        entries = max(-(-length // page) for length in lengths) + 1
        pages = len(lengths) * entries + 2
        cache = rng.standard_normal((pages, page, latent + rope)).astype(np.float32)
        self.cache = to_bits(cache) if bits else cache
        self.values = from_bits(self.cache) if bits else cache
        self.tables = rng.permutation(pages)[: len(lengths) * entries].reshape(-1, entries).astype(np.int32)
        self.sequence = np.sort(rng.integers(-1, len(lengths), tokens)).astype(np.int32)
        self.positions = np.array([rng.integers(0, lengths[s]) if s >= 0 else -9 for s in self.sequence], np.int32)
        # Queries that bfloat16 holds exactly, so that all kernels see the same.
        self.q = from_bits(to_bits(rng.standard_normal((tokens, heads, latent + rope))))
        self.latent = latent
        self.scale = 1.5 / np.sqrt(latent + rope)

    def run(self, part=slice(None), dtype=jnp.float32, tables=None):
        q = jnp.asarray(self.q[part], dtype)
        call = jax.jit(lambda *operands: ktx_ffi.mla_attention(*operands, self.scale))
        tables = self.tables if tables is None else tables
        operands = (self.cache, tables, self.sequence[part], self.positions[part])
        return np.asarray(call(q[..., : self.latent], q[..., self.latent :], *map(jnp.asarray, operands)))

    def reference(self):
        out = np.zeros((*self.q.shape[:2], self.latent))
        for t, (s, p) in enumerate(zip(self.sequence, self.positions, strict=True)):
            if s >= 0:
                rows = np.concatenate(self.values[self.tables[s]])[: p + 1].astype(np.float64)
                scores = self.q[t] @ rows.T * self.scale
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[t] = weights / weights.sum(-1, keepdims=True) @ rows[:, : self.latent]
        return out


def tolerance(case):
    # Queries, rows of a bfloat16 cache and softmax weights become integers of 11 bits and more.
    return 2e-3 if case.cache.dtype == np.uint16 and ktx_ffi.isa() == "avx512" else 1e-5


@pytest.mark.parametrize("bits", [True, False], ids=["bf16", "f32"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 12),
    heads=st.integers(1, 40),
    latent=st.sampled_from([8, 32, 40, 64, 512]),
    rope=st.sampled_from([2, 16, 32, 64]),
    page=st.sampled_from([1, 7, 16, 64, 100]),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
)
def test_matches_numpy(bits, seed, tokens, heads, latent, rope, page, lengths):
    case = Case(seed, tokens, heads, latent, rope, page, lengths, bits)
    out, expected = case.run(), case.reference()
    assert np.linalg.norm(out - expected) <= tolerance(case) * np.linalg.norm(expected) + 1e-12
    np.testing.assert_array_equal(out[case.sequence < 0], 0)


@pytest.mark.parametrize("bits", [True, False], ids=["bf16", "f32"])
def test_a_token_does_not_depend_on_its_batch_or_on_threads(bits):
    case = Case(0, 20, 8, 64, 16, 16, [2500, 1100, 60], bits)
    whole = case.run()
    expected = case.reference()
    assert np.linalg.norm(whole - expected) <= tolerance(case) * np.linalg.norm(expected)
    before = ktx_ffi.threads()
    try:
        for threads in (1, 2, 3, 7):
            ktx_ffi.set_threads(threads)
            np.testing.assert_array_equal(case.run(), whole)
            for part in (slice(0, 1), slice(7, 8), slice(19, 20), slice(4, 13)):
                np.testing.assert_array_equal(case.run(part), whole[part])
    finally:
        ktx_ffi.set_threads(before)


def test_bfloat16_queries():
    case = Case(1, 9, 4, 32, 16, 16, [90, 30], True)
    np.testing.assert_array_equal(case.run(dtype=jnp.bfloat16), case.run().astype(jnp.bfloat16))


def test_indices_are_checked():
    case = Case(2, 4, 2, 8, 8, 4, [9], False)
    case.sequence[:] = 0
    case.positions[:] = 5
    with pytest.raises(ERROR, match="ktx_mla_attention: token 0 is of sequence 0, but block_tables has 0"):
        case.run(tables=case.tables[:0])
    bad = case.tables.copy()
    bad[0, 0] = len(case.cache)
    with pytest.raises(ERROR, match="block table 0 names page"):
        case.run(tables=bad)
    case.positions[3] = 4 * case.tables.shape[1]
    with pytest.raises(ERROR, match="token 3 is at position"):
        case.run()


def test_wrong_shapes_are_errors():
    case = Case(3, 4, 2, 8, 8, 4, [9], False)
    case.cache = case.cache[..., :-1]
    with pytest.raises(ERROR, match=r"axis 2 of cache f32\[.*15\] must be 16"):
        case.run()


@pytest.mark.parametrize("bits", [True, False], ids=["bf16", "f32"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32 rows", "bf16 rows"])
def test_cache_write(bits, dtype):
    rng = np.random.default_rng(4)
    cache = rng.standard_normal((3, 5, 8)).astype(np.float32)
    cache = to_bits(cache) if bits else cache
    rows = jnp.asarray(rng.standard_normal((4, 8)), dtype)
    slots = np.array([14, -1, 0, 7], np.int32)
    expected = cache.reshape(15, 8).copy()
    wide = np.asarray(rows.astype(jnp.float32))
    for t in (0, 2, 3):
        expected[slots[t]] = to_bits(wide[t]) if bits else wide[t]
    out = jax.jit(ktx_ffi.cache_write)(jnp.asarray(cache), rows, jnp.asarray(slots))
    np.testing.assert_array_equal(np.asarray(out).reshape(15, 8), expected)
    with pytest.raises(ERROR, match="slot 15 of row 1 is beyond cache"):
        jax.block_until_ready(
            ktx_ffi.cache_write(jnp.asarray(cache), rows, jnp.asarray(np.array([1, 15, 2, 3], np.int32)))
        )


def test_a_donated_cache_is_written_in_place():
    write = jax.jit(ktx_ffi.cache_write, donate_argnums=0)
    args = (jnp.zeros((64, 16, 32), jnp.uint16), jnp.ones((2, 32)), jnp.asarray([3, 5], jnp.int32))
    hlo = write.lower(*args).compile().as_text()
    assert "copy(" not in hlo
    pointer = args[0].unsafe_buffer_pointer()
    assert write(*args).unsafe_buffer_pointer() == pointer
