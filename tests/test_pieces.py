# SPDX-License-Identifier: Apache-2.0
"""Weights in pieces: together they are the whole, wherever the cuts fall."""

import jax.numpy as jnp
import ktx_ffi
import numpy as np
import pytest
from ffi_reference import dequantize, random_blocks
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax import ops
from ktx_jax.quantized import HostArray, QuantizedArray
from ktx_jax.sharding.granules import GRANULES, piece, stored_bytes, touched_blocks


@st.composite
def cuts(draw):
    kind = draw(st.sampled_from(sorted(GRANULES)))
    block = GGML_QUANT_SIZES[kind][0]
    parts = draw(st.sampled_from([1, 2, 3, 4, 8]))
    # A row of whole blocks that the parts divide into whole granules.
    step = np.lcm(block, parts * GRANULES[kind])
    return kind, parts, int(step * draw(st.integers(1, 3)))


@given(cuts())
@settings(max_examples=150, deadline=None)
def test_pieces_hold_their_own_values_and_zeros(case):
    kind, parts, k = case
    blocks, block = random_blocks(np.random.default_rng(k), kind, 3, k), GGML_QUANT_SIZES[kind][0]
    whole, size = dequantize(blocks, kind), k // parts
    for index in range(parts):
        mine = piece(blocks, kind, parts, index)
        assert mine.shape[-2] == touched_blocks(k, kind, parts)
        assert mine.nbytes == stored_bytes((3, k), kind, (1, parts))
        begin = index * size % block
        expected = np.zeros((3, mine.shape[-2] * block), np.float32)
        expected[:, begin : begin + size] = whole[:, index * size : (index + 1) * size]
        np.testing.assert_array_equal(dequantize(mine, kind), expected)


needs_ffi = pytest.mark.skipif(not ktx_ffi.available(), reason=ktx_ffi.why_unavailable())

# V2.5's experts are 1536 wide, six super-blocks: an eighth is 192 values.
E, F, D, TOKENS, WAYS = 16, 1536, 256, 24, 8


@pytest.fixture(scope="module")
def layer():
    """A layer's stacks of experts as blocks, and inputs for them."""
    rng = np.random.default_rng(3)
    stacks = {
        "gate": (random_blocks(np.random.default_rng(1), T.Q4_K, E, F, D), T.Q4_K),
        "up": (random_blocks(np.random.default_rng(2), T.Q4_K, E, F, D), T.Q4_K),
        "down": (random_blocks(np.random.default_rng(3), T.Q6_K, E, D, F), T.Q6_K),
    }
    x = jnp.asarray(rng.standard_normal((TOKENS, D), np.float32))
    ids = jnp.asarray(np.argsort(rng.random((TOKENS, E)), axis=1)[:, :6], jnp.int32)
    return stacks, x, ids, jnp.asarray(rng.random((TOKENS, 6), np.float32))


def held(blocks: np.ndarray, kind: T, implementation: str):
    if implementation == "xla":
        return QuantizedArray(jnp.asarray(blocks), kind), None
    weights = ktx_ffi.Weights(np.ascontiguousarray(blocks), kind)
    handles = jnp.asarray(weights.operand).reshape((1,) * len(weights.shape))
    return HostArray(handles, weights.shape, kind, precise=implementation == "ffi-precise"), weights


def computed(layer, implementation, part=None, cut=None):
    """What one device adds: all experts, or an eighth of them by number or by width."""
    stacks, x, ids, weights = layer
    offset = 0
    if cut == "expert":
        mine = slice(part * E // WAYS, (part + 1) * E // WAYS)
        stacks = {name: (blocks[mine], kind) for name, (blocks, kind) in stacks.items()}
        ids = ids - mine.start
    elif cut == "width":
        rows = slice(part * F // WAYS, (part + 1) * F // WAYS)
        down, kind = stacks["down"]
        offset = rows.start % GGML_QUANT_SIZES[kind][0]
        stacks = {name: (blocks[:, rows], kind) for name, (blocks, kind) in stacks.items()}
        stacks["down"] = (piece(down, kind, WAYS, part), kind)
    arrays, kept = zip(*(held(*stacks[name], implementation) for name in ("gate", "up", "down")), strict=True)
    out = np.asarray(ops.experts(x, ids, weights, *arrays, offset=jnp.int32(offset)), np.float64)
    del kept
    return out


def error(truth: np.ndarray, value: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("cut", ["expert", "width"])
@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("ffi", marks=needs_ffi), pytest.param("ffi-precise", marks=needs_ffi)]
)
def test_experts_cut_eight_ways_add_up(layer, implementation, cut):
    exact = computed(layer, "xla")
    whole = computed(layer, implementation)
    parts = sum(computed(layer, implementation, part, cut) for part in range(WAYS))
    if implementation == "xla" or cut == "expert":
        assert error(whole, parts) < 1e-6
    elif implementation == "ffi-precise":
        assert error(whole, parts) < 1e-4
    else:
        # The kernels' int8 scale covers the part of a super-block that is there: closer to the exact sum, not farther.
        assert error(exact, parts) < 1.02 * error(exact, whole)
        assert error(whole, parts) < 1.5 * error(exact, whole)
