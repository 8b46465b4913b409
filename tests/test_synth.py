# SPDX-License-Identifier: Apache-2.0
"""Synthetic files: true sizes, sound weights, and readable by everything that reads real ones."""

from collections import Counter

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.errors import KtxError
from ktx_jax.gguf.random_blocks import random_pieces
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.config import config_from_gguf
from ktx_jax.presets import SHAPES, Shape, planned_tensors
from ktx_jax.synth import _metadata, synthesize
from ktx_jax.tokenizer import Tokenizer

TINY = Shape("tiny", 2, 256, 512, 256, 4, 256, 16, 4, 2, 2.0, 0.1, kv_lora=256)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return synthesize(TINY, tmp_path_factory.mktemp("synth") / "tiny.gguf", "q4_k_m")


@pytest.mark.parametrize(
    ("shape", "quant", "count", "gigabytes"),
    [
        ("v2-lite", "q4_k_m", 404, 10.36),
        ("v2-lite", "f16", 404, 31.42),
        ("v2.5", "q4_k_m", 1019, 142.51),
        ("v2.5", "iq4_xs", 1019, 126.78),
        ("v2", "q4_k_m", 1019, 142.51),
    ],
)
def test_planned_sizes(shape, quant, count, gigabytes):
    tensors = planned_tensors(shape, quant)
    assert len(tensors) == count
    assert sum(t.nbytes for t in tensors) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_types_of_v2_lite():
    types = {t.name: t.ggml_type for t in planned_tensors("v2-lite", "q4_k_m")}
    assert types["output.weight"] == T.Q6_K
    assert types["blk.0.ffn_down.weight"] == T.Q8_0  # 10944 is no multiple of 256
    assert Counter(types[f"blk.{i}.ffn_down_exps.weight"] for i in range(1, 27)) == {T.Q5_0: 14, T.Q8_0: 12}
    assert {types[f"blk.{i}.attn_k_b.weight"] for i in range(27)} == {T.Q5_0}


def test_layers_cut():
    names = [t.name for t in planned_tensors("v2.5", "q4_k_m", layers=3)]
    assert len(names) == 3 + 13 + 2 * 17
    assert "blk.2.ffn_gate_exps.weight" in names
    assert not any(n.startswith("blk.3.") for n in names)


def test_structure_is_that_of_a_real_file(tiny, oracle):
    """The same tensors, shapes and types, and at least the same keys, as a file that llama.cpp quantized."""
    ours, real = GGUFReader(tiny), GGUFReader(oracle / "minigroup" / "q4_k_m.gguf")
    cut = {t.name: t.tensor_type for t in real.tensors if not t.name.startswith("blk.2.")}
    layer_dependent = [n for n in cut if "ffn_down" in n]
    types = {t.name: t.tensor_type for t in ours.tensors}
    assert set(types) == set(cut)
    assert all(types[n] == cut[n] for n in cut if n not in layer_dependent)
    assert set(real.fields) <= set(ours.fields)
    for key, field in real.fields.items():
        assert ours.fields[key].types == field.types, key


def test_read_as_a_model(tiny):
    with open_gguf(tiny) as file:
        config = config_from_gguf(file.metadata, file.tensors)
        assert (config.num_hidden_layers, config.n_group, config.topk_group) == (2, 4, 2)
        assert (config.q_lora_rank, config.vocab_size) == (256, 102400)
        assert config.moe_intermediate_size == 256


@pytest.mark.parametrize("shape", SHAPES)
def test_true_metadata(shape):
    names = {t.name: t for t in planned_tensors(shape, "q4_k_m")}
    config = config_from_gguf(_metadata(SHAPES[shape], "q4_k_m"), names)
    lite = shape == "v2-lite"
    assert config.softmax_scale == pytest.approx(0.1147214 if lite else 0.1352338, rel=1e-5)
    assert (config.q_lora_rank is None) == lite
    assert (config.n_group, config.topk_group) == ((1, 1) if lite else (8, 3))


def test_weights_are_sound(tiny):
    for tensor in GGUFReader(tiny).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, tensor.shape[0])
        if tensor.name.endswith("_norm.weight"):
            assert (values == 1).all()
            continue
        assert np.isfinite(values).all()
        assert values.std() == pytest.approx(float(tensor.shape[0]) ** -0.5, rel=0.06), tensor.name
        assert abs(values.mean()) < 0.1 * values.std()
        assert len(np.unique(values, axis=0)) == len(values)


def test_same_seed_same_file(tmp_path, tiny):
    again = synthesize(TINY, tmp_path / "again.gguf", "q4_k_m")
    assert again.read_bytes() == tiny.read_bytes()
    other = synthesize(TINY, tmp_path / "other.gguf", "q4_k_m", seed=1)
    assert other.read_bytes() != tiny.read_bytes()


@pytest.mark.parametrize(
    "ggml_type",
    [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS],
    ids=lambda t: t.name,
)
def test_random_blocks_have_the_wanted_moments(ggml_type):
    pieces = list(random_pieces(np.random.default_rng(0), ggml_type, 1 << 20, 0.02))
    raw = np.concatenate([p.reshape(-1) for p in pieces])
    values = gguf.quants.dequantize(raw.reshape(256, -1), ggml_type)
    assert values.size == 1 << 20
    assert values.std() == pytest.approx(0.02, rel=0.02)
    assert abs(values.mean()) < 0.0005


def test_no_random_blocks_of_types_no_mix_uses():
    with pytest.raises(KtxError, match="no random blocks of type Q2_K"):
        next(random_pieces(np.random.default_rng(0), T.Q2_K, 256, 1.0))


def test_any_text_is_tokenized(tiny):
    tokenizer = Tokenizer.from_gguf(tiny)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (100000, frozenset({100001}))
    assert tokenizer.encode("")[:1] == [100000]
    # Every id decodes.
    assert all(tokenizer.decode([i]) is not None for i in range(0, 102400, 97))

    @settings(max_examples=50, deadline=None)
    @given(st.text(max_size=40))
    def holds(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    holds()


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(KtxError, match=r"no shape named 'v3'; there are v2-lite, v2\.5, v2"):
        planned_tensors("v3", "q4_k_m")
    with pytest.raises(KtxError, match="no mix named 'q9'"):
        synthesize("v2-lite", tmp_path / "a.gguf", "q9")
    with pytest.raises(KtxError, match="DeepSeek-V2-Lite has 27 layers; 28 cannot be kept"):
        synthesize("v2-lite", tmp_path / "a.gguf", "q8_0", layers=28)
    assert not list(tmp_path.iterdir())
