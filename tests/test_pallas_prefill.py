# SPDX-License-Identifier: Apache-2.0
"""Expanded attention of prompts on the GPU kernels, in Mosaic's CPU interpreter, against a float32 reference."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from gguf import GGMLQuantizationType
from pallas_cases import (
    PROMPT_TYPES,
    head_weights,
    interpreter,
    prompt_case,
    prompt_tokens,
    random_rows,
    relative_error,
)
from pallas_models import references

from ktx_jax import ops
from ktx_jax.quantized import PlanesArray
from pallas_kernels import mla_attention, quantized_matmul
from pallas_kernels import mla_prefill as family
from pallas_kernels import prefill_plan as planning
from pallas_kernels.crossover import attention_seconds, expanded_pays
from pallas_kernels.heuristics import LEAST_EXPANDED
from pallas_kernels.mla_expand import expand, expand_reference
from pallas_kernels.mla_prefill import mla_prefill, mla_prefill_reference
from pallas_kernels.prefill_plan import prefill_plan

OTHERS = (("BF16", "Q8_0"), ("Q4_0", "IQ4_XS"))
SLOW = pytest.mark.slow


def _kernel(case, tile=16):
    *operands, pages, table, sequence, positions, into = case
    plan = prefill_plan(table, sequence, positions, page=pages.shape[1], tile=tile)
    with interpreter():
        return np.asarray(mla_prefill(*operands, pages, plan, into, scale=0.07, interpret=True), np.float32)


def _check(case, out):
    live = np.asarray(case[-2]) >= 0
    assert np.isfinite(out).all()
    assert relative_error(out[live], mla_prefill_reference(*case[:-1], 0.07)[live]) < 8e-3
    return live


@pytest.mark.parametrize("names", [("Q5_0", "Q4_K"), *(pytest.param(n, marks=SLOW) for n in OTHERS)])
def test_expansion_meets_the_reference(names):
    """In tiles that are used; the other's latents are not read."""
    latents = random_rows((2, 256, 512), np.random.default_rng(1)).at[0].set(jnp.nan)
    k_b, v_b = head_weights(2, names)
    with interpreter():
        got = expand(latents, jnp.array([-1, 0]), k_b, v_b, names, interpret=True)
    for part, want in zip(got, expand_reference(latents, k_b, v_b, names), strict=True):
        assert relative_error(part[256:], want[256:]) < 4e-3


@pytest.mark.parametrize(
    ("spans", "page", "heads", "tile", "padding"),
    [
        pytest.param([(0, 37)], 64, 1, 16, 0, id="a whole prompt shorter than a block"),
        pytest.param(
            [(0, 131), (241, 283), (0, 5)], 16, 1, 16, 32, id="three sequences, one with earlier pages", marks=SLOW
        ),
        pytest.param([(120, 258)], 32, 1, 8, 8, id="a chunk over the edge of a tile of positions", marks=SLOW),
        pytest.param([(0, 130)], 64, 1, 64, 0, id="long runs", marks=SLOW),
    ],
)
def test_it_meets_the_reference(spans, page, heads, tile, padding):
    case = prompt_case(spans, page, heads, tile, padding)
    out = _kernel(case, tile)
    live = _check(case, out)
    assert (out[~live.reshape(-1, tile).repeat(tile, 0).any(1)] == 7).all()  # runs of padding are left as they were


@pytest.mark.slow
def test_sixteen_heads():
    """As V2-Lite has. V2.5's 128, eight times the blocks, are compiled (`test_pallas_compile`): heads share nothing."""
    case = prompt_case([(3, 40)], 64, heads=16)
    _check(case, _kernel(case))


@pytest.mark.slow
def test_a_row_depends_on_no_other(monkeypatch):
    """To the bit: alone, and in company that shares its ranges of positions, which begin and end elsewhere."""
    spans = [(250, 270), (0, 12)]
    case = prompt_case(spans[::-1], 64, 1)
    together = _kernel(case)[16:]
    first = prompt_tokens(spans[:1], 16)
    alone = (*(x[16:] for x in case[:2]), *case[2:6], case[6][1:], *first, case[-1][16:])
    np.testing.assert_array_equal(_kernel(alone), together)
    monkeypatch.setattr(planning, "RANGE_TILES", 1)
    np.testing.assert_array_equal(_kernel(alone), together)
    _check(alone, together)


def test_expanded_and_absorbed_agree():
    """Each as near to the exact values as bfloat16 keys, or latent queries, let it be."""
    case = prompt_case([(70, 140)], 64, 1)
    nope, rope, k_b, v_b, names, *where, _ = case
    live, pages = np.asarray(where[-1]) >= 0, where[0]
    where[0] = jnp.where((pages & 0x7FFF) > 0x7F80, 0, pages)  # XLA's path takes no NaN, be it of weight 0
    k_b, v_b = (PlanesArray(w, GGMLQuantizationType[name]) for w, name in zip((k_b, v_b), names, strict=True))
    with references():
        q_latent = ops.head_matmul(nope, k_b)
        mixed = ops.mla_attention(q_latent, rope, *where, scale=0.07, tile=16)
        absorbed = ops.head_matmul(mixed, v_b)
    expanded = _kernel(case)
    exact = mla_prefill_reference(*case[:-1], 0.07)[live]
    assert max(relative_error(x[live], exact) for x in (absorbed, expanded)) < 8e-3
    assert relative_error(absorbed[live], expanded[live]) < 1.2e-2


def test_each_sequence_takes_the_form_that_suits_it():
    """Many new tokens, and few: values of the one kernel are all ones, of the other what v_b makes of zeros."""
    page, heads = 64, 1
    spans = [(0, 200), (500, 516), (900, 1100)]
    sequence, positions = prompt_tokens(spans, 16, padding=16)
    k_b, v_b = (PlanesArray(w, GGMLQuantizationType[n]) for w, n in zip(head_weights(heads), PROMPT_TYPES, strict=True))
    queries = [jnp.zeros((len(positions), heads, n), jnp.bfloat16) for n in (128, 64)]
    pages = jnp.zeros((1, page, 576), jnp.uint16)
    table = jnp.zeros((3, 18), jnp.int32)

    def ones(*operands, scale):
        *_, (*_, at), into = operands
        return jnp.where((at >= 0)[:, None, None], 1, into).astype(into.dtype)

    def zeros(q_latent, *_, **__):
        return jnp.zeros(q_latent.shape, jnp.float32)

    with (
        mock.patch.object(family, "mla_prefill", ones),
        mock.patch.object(planning, "prefill_plan", lambda *where, **_: where),
        mock.patch.object(mla_attention, "mla_attention", zeros),
        mock.patch.object(quantized_matmul, "batched_matmul", lambda x, w, _: jnp.zeros((*x.shape[:2], 128), x.dtype)),
    ):
        out = ops.mla_values(*queries, k_b, v_b, pages, table, sequence, positions, scale=0.1, tile=16)
    expanded = np.asarray(out)[:, 0, 0] == 1
    many = np.isin(np.asarray(sequence), [0, 2]) & (np.asarray(positions) >= 0)
    np.testing.assert_array_equal(expanded, many)


def test_which_form_pays():
    for tokens in (LEAST_EXPANDED, 200, 512, 2048):
        assert expanded_pays(tokens, tokens)  # no earlier pages
    for positions in (512, 4096, 1 << 17):
        assert expanded_pays(512, positions)
        assert not expanded_pays(16, positions)
    # 2 x 128 x 512 products to expand a position, and 1088 against 320 for each token that sees it.
    crossover = next(tokens for tokens in range(128, 512) if expanded_pays(tokens, 1 << 20))
    assert crossover == pytest.approx(2 * 128 * 512 / (1088 - 320), rel=0.15)
    absorbed, expanded = attention_seconds(jnp.array([1, 512]), jnp.array([4096, 4096]))
    assert (absorbed < expanded).tolist() == [True, False]


def test_what_the_kernel_cannot_take_is_named():
    nope, rope, k_b, v_b, names, pages, table, sequence, positions, into = prompt_case([(0, 16)], 64, 1)

    def call(nope=nope, rope=rope, k_b=k_b, pages=pages, page=64, tile=16):
        plan = prefill_plan(table, sequence, positions, page=page, tile=tile)
        mla_prefill(nope, rope, k_b, v_b, names, pages, plan, into, scale=0.1)

    for options, said in (
        ({"k_b": k_b[:, :4]}, r"k_b of \(512, 128\) a head, not \(256, 128\)"),
        ({"nope": nope[..., :64]}, r"queries of 128 \+ 64 and rows of 576, not 64 \+ 64"),
        ({"page": 48}, "divide 256 positions, not 48"),
        ({"nope": nope.astype(jnp.float32)}, "queries float32"),
        ({"tile": 1}, "runs of 8, 16, 32 or 64 tokens, not 1"),
    ):
        with pytest.raises(NotImplementedError, match=said):
            call(**options)
    with pytest.raises(ValueError, match="16 tokens do not come in runs of 64"):
        call(tile=64)
    assert not ops.expands(jnp.zeros((1, 512, 128)), jnp.zeros((1, 128, 512)), 512, 64, 16)
    records = [PlanesArray(w, GGMLQuantizationType[n]) for w, n in zip((k_b, v_b), names, strict=True)]
    assert ops.expands(*records, 512, 64, 16)
    assert not ops.expands(*records, 64, 64, 16)
    assert not ops.expands(*records[::-1], 512, 64, 16)


@pytest.mark.slow
def test_the_benchmark_puts_both_forms_side_by_side(monkeypatch):
    """On its own operands; references compute."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_prompts

    given, said = [], []

    def seconds(form, sets):
        given.append(np.asarray(form(*sets[0])))
        return float(len(given))

    monkeypatch.setattr(gpu_prompts, "GRID", ((128, 128), (32, 200)))
    monkeypatch.setattr(gpu_prompts, "HEADS", 1)
    monkeypatch.setattr(gpu_prompts, "expanded", gpu_prompts.reference)
    monkeypatch.setattr(gpu_prompts, "absorbed", gpu_prompts.reference)
    rows = gpu_prompts.run_crossover(["crossover"], seconds, said.append)
    assert [row["chosen"] for row in rows] == ["expanded", "absorbed"]
    assert [row["faster"] for row in rows] == ["absorbed"] * 2
    assert [x.shape for x in given] == [(128, 1, 128)] * 2 + [(32, 1, 128)] * 2
    assert all(np.isfinite(x).all() for x in given)
    assert "crossover, 32 tokens of 200, 1 heads" in said[-1]
