# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' PTX, compiled for an H200 that is not there, executed block by block in NumPy (`ptx`).

`tests/test_ptx.py` runs these tests in a process of their own: JAX asks its plugins once, and the one for CUDA, which
compiles, would not answer without a driver. Errors are bounded as in the interpreter's tests of the same kernels.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_cases import (
    attention_case,
    experts_case,
    head_weights,
    prompt_case,
    random_records,
    random_rows,
    relative_error,
)

from pallas_kernels import mla_attention as absorbed
from pallas_kernels import mla_prefill as expanded
from pallas_kernels import mosaic
from pallas_kernels import prefill_plan as planning
from pallas_kernels.grouped_matmul import gated_matmul, grouped_mlp, grouped_mlp_reference
from pallas_kernels.latents import write_latents, write_latents_reference
from pallas_kernels.mla_attention import mla_attention, mla_attention_reference
from pallas_kernels.mla_expand import expand, expand_reference
from pallas_kernels.mla_prefill import mla_prefill, mla_prefill_reference
from pallas_kernels.parts import total_of
from pallas_kernels.prefill_plan import prefill_plan
from pallas_kernels.quantized_matmul import batched_matmul, quantized_matmul, quantized_matmul_reference
from pallas_kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from pallas_kernels.router import choose_experts, choose_experts_reference

from .machine import Machine
from .text import Fault

# float32 sums in another order; results, or weights too, rounded to bfloat16; as attention's weights are.
_SUMS, _ROUNDED, _ATTENTION = 2e-6, 8e-3, 8e-3


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    """Kernels are executed while it is in use. They must be called eagerly, outside of `jax.jit`."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    machine = Machine(tmp_path)
    monkeypatch.setattr(mosaic, "kernel", machine.kernel)
    monkeypatch.setattr(mosaic, "mutable", jax.new_ref)
    return machine


def _product_error(name: str, rows: int, n: int, k: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> float:
    rng = np.random.default_rng(0)
    x, weight = random_rows((rows, k), rng), random_records(name, (n, k), rng)
    out = quantized_matmul(x, weight, name, dtype=dtype)
    return relative_error(out, quantized_matmul_reference(x, weight, name))


@pytest.mark.parametrize(
    ("name", "rows", "k"), [("Q5_0", 5, 704), ("Q4_K", 8, 1024), ("Q6_K", 13, 512), ("BF16", 16, 384)]
)
def test_products_of_few_rows(machine, name, rows, k):
    assert _product_error(name, rows, 64, k, jnp.float32) < _SUMS


@pytest.mark.parametrize(("name", "rows", "n", "k"), [("Q5_K", 40, 128, 512), ("Q8_0", 130, 192, 320)])
def test_products_of_many_rows(machine, name, rows, n, k):
    assert _product_error(name, rows, n, k) < _ROUNDED


@pytest.mark.parametrize(("name", "tokens", "d"), [("IQ4_XS", 3, 512), ("Q8_0", 20, 192)])
def test_gate_and_up(machine, name, tokens, d):
    rng = np.random.default_rng(1)
    x, gate, up = (
        random_rows((tokens, d), rng) * jnp.bfloat16(0.1),
        *(random_records(name, (128, d), rng) for _ in "gu"),
    )
    gate_x, up_x = (quantized_matmul_reference(x, w, name) for w in (gate, up))
    assert relative_error(gated_matmul(x, gate, up, name), jax.nn.silu(gate_x) * up_x) < _ROUNDED


@pytest.mark.parametrize(
    ("tokens", "experts", "names"),
    [
        pytest.param(1, 5, ("Q4_K", "Q6_K"), id="one token"),
        pytest.param(5, 3, ("Q4_K", "Q5_0"), id="tiles of 8"),
        pytest.param(21, 2, ("Q5_K", "Q8_0"), id="tiles of many"),
    ],
)
def test_experts(machine, tokens, experts, names):
    """A tile for every pair or expert that there could be: those that are left over are skipped."""
    x, ids, *rest = experts_case(tokens, experts, 2, 256, 128 if names[1] != "Q6_K" else 256, names, 7)
    ids = ids.at[-1, -1].set(-1)
    assert relative_error(grouped_mlp(x, ids, *rest), grouped_mlp_reference(x, ids, *rest)) < 2e-2


@pytest.mark.parametrize(("name", "rows", "n", "k"), [("Q5_0", 3, 512, 128), ("Q8_0", 20, 128, 512)])
def test_a_product_a_head(machine, name, rows, n, k):
    rng = np.random.default_rng(2)
    x, weight = random_rows((rows, 2, k), rng), random_records(name, (2, n, k), rng)
    want = jnp.stack([quantized_matmul_reference(x[:, h], weight[h], name) for h in range(2)], axis=1)
    assert relative_error(batched_matmul(x, weight, name), want) < _ROUNDED


@pytest.mark.parametrize(
    ("page", "blocks", "tile", "positions", "splits"),
    [
        pytest.param(64, 4, 1, [200, 63, -1], 1, id="decode over long pages, and padding"),
        pytest.param(16, 13, 1, [180, 3], 2, id="ranges over short pages"),
        pytest.param(16, 5, 4, [61, 62, 63, 64, 0, 1, 2, -1], 1, id="chunks of four tokens"),
    ],
)
def test_absorbed_attention(machine, monkeypatch, page, blocks, tile, positions, splits):
    """Everything beyond a sequence's end is NaN."""
    case = attention_case(16, page, blocks, tile, positions, seed=1)
    monkeypatch.setattr(absorbed, "attention_splits", lambda blocks, positions: splits)
    out = mla_attention(*case, scale=0.1, tile=tile)
    live = np.array(positions) >= 0
    assert np.isfinite(out).all()
    assert relative_error(out[live], mla_attention_reference(*case, 0.1)[live]) < _ATTENTION
    assert len(machine.launches) == 2  # the second merges the ranges


def test_expansion(machine):
    """Of the tiles that are used; the other's latents are not read."""
    latents, names = random_rows((2, 256, 512), np.random.default_rng(1)).at[0].set(jnp.nan), ("Q5_0", "Q8_0")
    weights = head_weights(1, names)
    got = expand(latents, jnp.array([-1, 0]), *weights, names)
    for part, want in zip(got, expand_reference(latents, *weights, names), strict=True):
        assert relative_error(part[256:], want[256:]) < _ROUNDED


_traced_loop = jax.lax.fori_loop


def _eager_loop(first: int, end: jax.Array, body: Callable, carry: Any, **options: Any) -> Any:
    """The loop over ranges as one of Python, so that its kernels are executed; those inside of kernels are traced."""
    if body.__name__ != "one_range":
        return _traced_loop(first, end, body, carry, **options)
    for i in range(first, int(end)):
        carry = body(jnp.int32(i), carry)
    return carry


@pytest.mark.parametrize(
    ("spans", "tile", "tiles"),
    [
        pytest.param([(0, 37), (241, 283)], 16, 8, id="two sequences, one with earlier pages"),
        pytest.param([(250, 314)], 64, 1, id="sums that are kept between two ranges"),
    ],
)
def test_expanded_attention(machine, monkeypatch, spans, tile, tiles):
    monkeypatch.setattr(planning, "RANGE_TILES", tiles)
    case = prompt_case(spans, 64, 1, tile, padding=tile)
    *operands, pages, table, sequence, positions, into = case
    plan = prefill_plan(table, sequence, positions, page=64, tile=tile)
    monkeypatch.setattr(jax.lax, "fori_loop", _eager_loop)
    out = np.asarray(mla_prefill.__wrapped__(*operands, pages, plan, into, scale=0.07), np.float32)
    live = np.asarray(positions) >= 0
    assert np.isfinite(out).all()
    assert relative_error(out[live], mla_prefill_reference(*case[:-1], 0.07)[live]) < _ATTENTION
    assert (out[-tile:] == 7).all()  # runs of padding are left as they were


def _assert_rounded_alike(got: jax.Array, want: jax.Array) -> None:
    """bfloat16 of the same float32 numbers, but for sums in another order."""
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7)


@pytest.mark.parametrize("size", [5120, 640])
def test_norms(machine, size):
    """Of a row and of a product in parts."""
    rng = np.random.default_rng(3)
    x, weight = random_rows((2, size), rng), jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)
    y = total_of(jnp.asarray(rng.standard_normal((3, 2, size)), jnp.float32))
    got, want = add_rms_norm(x, y, weight, 1e-6), add_rms_norm_reference(x, y, weight, 1e-6)
    for a, b in zip(got, want, strict=True):
        _assert_rounded_alike(a, b)


@pytest.mark.parametrize(("count", "groups", "kept"), [(160, 8, 3), (64, 1, 1)])
def test_choice_of_experts(machine, count, groups, kept):
    """Logits in few steps, so that experts and groups tie."""
    logits = jnp.asarray(np.round(np.random.default_rng(4).standard_normal((4, count)) * 2), jnp.float32)
    choice = {"experts": 6, "groups": groups, "kept_groups": kept, "normalized": True, "scale": 16.0}
    live = jnp.array([True, True, False, True])
    got, want = (f(logits, live, **choice) for f in (choose_experts, choose_experts_reference))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


@pytest.mark.parametrize("summed", [True, False])
def test_latents_go_where_they_belong(machine, summed):
    rng = np.random.default_rng(5)
    places, page = jnp.array([17, -1, 47, 0], jnp.int32), 16
    summands = jnp.asarray(rng.standard_normal((4, 4, 576)), jnp.float32).at[:, 1].set(np.nan)
    x = total_of(summands) if summed else summands.sum(0).astype(jnp.bfloat16)
    angles, weight = rng.uniform(0, 6, (4, 32)), jnp.asarray(rng.uniform(0.5, 2, 512), jnp.float32)
    pages = jax.lax.bitcast_convert_type(random_rows((3, page, 576), rng), jnp.uint16)
    operands = pages, x, weight, 1e-6, *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)), places
    got, want = (np.asarray(f(*operands)).reshape(-1, 576) for f in (write_latents, write_latents_reference))
    _assert_rounded_alike(got[[0, 17, 47]].view(jnp.bfloat16), want[[0, 17, 47]].view(jnp.bfloat16))
    others = np.setdiff1d(np.arange(3 * page), [0, 17, 47])
    np.testing.assert_array_equal(got[others], np.asarray(pages).reshape(-1, 576)[others])


def _few_rows() -> None:
    _product_error("Q4_K", 8, 64, 1024, jnp.float32)


def _decode() -> None:
    mla_attention(*attention_case(16, 32, 13, 1, [400], seed=1), scale=0.1)


def _prompt() -> None:
    """A block of `mla_prefill` with 42 tokens after 241 positions: three times 128 keys, the last two masked."""
    rng = np.random.default_rng(6)
    queries = [random_rows((3, 16, width), rng) for width in (128, 64)]
    position = np.full((1, 128), -1, np.int32)
    position[0, :42] = np.arange(241, 283)
    plan = position, np.array([[0, 1, 2, 3, 3, 3, 3, 3]], np.int32), np.array([[0, 0, 3, 1, 3]], np.int32)
    keys = [random_rows((512, width), rng) for width in (128, 64, 128)]
    out, sums, rows = (
        jax.new_ref(jnp.zeros(shape, dtype))
        for shape, dtype in (((3, 16, 128), jnp.bfloat16), ((1, 128, 128), jnp.float32), ((2, 1, 1, 128), jnp.float32))
    )
    expanded._attend((*queries, *map(jnp.asarray, plan), *keys), out, (sums, rows), scale=0.07, interpret=False)


_WAIT, _PROXY_FENCE, _FENCE = r"LAB_WAIT:[^}]*", r"fence\.proxy\.async\S*;", r"wgmma\.fence\S*;"
_BARRIER = r"bar\.sync\s[^;]*;"


@pytest.mark.parametrize(
    ("kernel", "pattern", "sites", "said"),
    [
        pytest.param(_few_rows, _WAIT, (0,), "race", id="products, wait for a copy"),
        pytest.param(_few_rows, _PROXY_FENCE, (0, 1), "without a proxy fence", id="products, proxy fences"),
        # Without the wait for the other warpgroup, its fence has not been waited for either.
        pytest.param(
            _decode,
            _WAIT,
            (6, 7, 8, 9),
            "race|without a proxy fence",
            id="decode, waits for copies and the other warpgroup",
        ),
        pytest.param(_decode, _FENCE, (0, 1), "without wgmma.fence", id="decode, before products"),
        # The first keeps a warp from storing results over queries that another of its warpgroup has yet to read.
        pytest.param(_prompt, _BARRIER, (2, 3), "race", id="prompts, before and after results are stored"),
        pytest.param(_prompt, _PROXY_FENCE, (0,), "without a proxy fence", id="prompts, proxy fence"),
    ],
)
def test_what_is_left_out_is_noticed(machine, kernel, pattern, sites, said):
    """Each of these instructions, counted as they stand in the PTX, is one that the kernel is wrong without."""
    for site in sites:

        def without(ptx: str, site: int = site) -> str:
            found = list(re.finditer(pattern, ptx))
            return ptx if site >= len(found) else ptx[: found[site].start()] + ptx[found[site].end() :]

        machine.edit = without
        with pytest.raises(Fault, match=said):
            kernel()
