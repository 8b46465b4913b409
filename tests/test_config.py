# SPDX-License-Identifier: Apache-2.0
"""The configuration of the released models from their files' metadata, and what is refused."""

import dataclasses
import logging

import numpy as np
import pytest

from ktx_jax.gguf.errors import GGUFError
from ktx_jax.model.config import config_from_gguf
from ktx_jax.model.rope import inverse_frequencies

COMMON = {
    "leading_dense_block_count": 1,
    "context_length": 163840,
    "vocab_size": 102400,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "expert_used_count": 6,
    "expert_shared_count": 2,
    "expert_gating_func": 1,
    "rope.dimension_count": 64,
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096,
}
V2_5 = COMMON | {
    "block_count": 60,
    "embedding_length": 5120,
    "feed_forward_length": 12288,
    "expert_feed_forward_length": 1536,
    "attention.head_count": 128,
    "attention.q_lora_rank": 1536,
    "expert_count": 160,
    "expert_weights_scale": 16.0,
    "expert_group_count": 8,
    "expert_group_used_count": 3,
    "rope.scaling.yarn_log_multiplier": 0.1,
}
LITE = COMMON | {
    "block_count": 27,
    "embedding_length": 2048,
    "feed_forward_length": 10944,
    "expert_feed_forward_length": 1408,
    "attention.head_count": 16,
    "expert_count": 64,
    "expert_weights_scale": 1.0,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}
TENSORS = {"token_embd.weight": None, "output.weight": None}
GROUPS = ("expert_group_count", "expert_group_used_count")


def read(keys, override=None, tensors=TENSORS, **changes):
    keys = {key: value for key, value in (keys | changes).items() if value is not None}
    metadata = {f"deepseek2.{key}": value for key, value in keys.items()}
    return config_from_gguf(metadata, tensors, override=override, file="m.gguf")


def without(keys, *gone):
    return {key: value for key, value in keys.items() if key not in gone}


def test_v2_5():
    c = read(V2_5)
    assert (c.num_hidden_layers, c.first_k_dense_replace, c.vocab_size, c.hidden_size) == (60, 1, 102400, 5120)
    assert (c.intermediate_size, c.moe_intermediate_size, c.num_attention_heads) == (12288, 1536, 128)
    assert (c.q_lora_rank, c.kv_lora_rank) == (1536, 512)
    assert (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim) == (128, 64, 128)
    assert (c.qk_head_dim, c.latent_dim) == (192, 576)
    assert (c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts) == (160, 6, 2)
    assert (c.n_group, c.topk_group, c.routed_scaling_factor, c.norm_topk_prob) == (8, 3, 16.0, False)
    assert (c.max_position_embeddings, c.rope_theta, c.rms_norm_eps) == (163840, 10000.0, 1e-6)
    assert c.yarn is not None
    assert (c.yarn.factor, c.yarn.original_context, c.yarn.beta_fast, c.yarn.beta_slow) == (40.0, 4096, 32.0, 1.0)
    assert not c.tie_word_embeddings
    assert [c.is_moe(layer) for layer in (0, 1, 59)] == [False, True, True]
    assert c.softmax_scale == pytest.approx(0.1352338, abs=5e-8)


def test_v2_lite():
    c = read(LITE)
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.q_lora_rank) == (27, 2048, 16, None)
    assert (c.intermediate_size, c.moe_intermediate_size, c.n_routed_experts) == (10944, 1408, 64)
    assert (c.n_group, c.topk_group, c.routed_scaling_factor) == (1, 1, 1.0)
    assert c.softmax_scale == pytest.approx(0.1147214, abs=5e-8)


@pytest.mark.parametrize("keys", [V2_5, LITE], ids=["v2.5", "lite"])
def test_old_files_say_the_same(keys, caplog):
    """Files from before 2025: expanded head sizes as key_length, a key and value head each, no group keys."""
    old = without(keys, "attention.key_length_mla", "attention.value_length_mla", "expert_gating_func", *GROUPS)
    old |= {"attention.key_length": 192, "attention.value_length": 128}
    old["attention.head_count_kv"] = old["attention.head_count"]
    assert read(old, tensors=TENSORS | {"blk.0.attn_kv_b.weight": None}) == dataclasses.replace(
        read(keys), k_b_transposed=False
    )


def test_both_layouts_in_one_file_are_read_as_the_new_one():
    both = {"blk.0.attn_kv_b.weight": None, "blk.0.attn_k_b.weight": None, "blk.0.attn_v_b.weight": None}
    assert read(V2_5, tensors=TENSORS | both).k_b_transposed


def test_absent_groups_are_those_of_v2_and_said(caplog):
    with caplog.at_level(logging.WARNING, "ktx_jax"):
        c = read(without(V2_5, *GROUPS))
    assert (c.n_group, c.topk_group) == (8, 3)
    [record] = caplog.records
    assert "no expert group keys and 160 experts" in record.getMessage()
    assert "override expert_group_count" in record.getMessage()


def test_absent_groups_of_other_models_are_one(caplog):
    c = read(without(LITE, *GROUPS))
    assert (c.n_group, c.topk_group) == (1, 1)
    assert not caplog.records


def test_given_groups_are_not_guessed(caplog):
    c = read(without(V2_5, *GROUPS), {"expert_group_count": 4, "expert_group_used_count": 2})
    assert (c.n_group, c.topk_group) == (4, 2)
    assert not caplog.records


@pytest.mark.parametrize("prefix", ["", "deepseek2."])
def test_override(prefix):
    c = read(LITE, {f"{prefix}rope.scaling.factor": 20, f"{prefix}expert_used_count": 4})
    assert c.yarn is not None
    assert (c.yarn.factor, c.num_experts_per_tok) == (20.0, 4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"expert_groups": 4}, ["unknown keys: expert_groups;", "expert_group_count, expert_group_used_count"]),
        ({"expert_group_count": "4"}, ["override: deepseek2.expert_group_count should be int, found '4'"]),
        ({"expert_group_count": True}, ["should be int, found True"]),
        ({"expert_used_count": 2.0}, ["should be int, found 2.0"]),
        ({"rope.freq_base": float("nan")}, ["rope.freq_base should be a finite number"]),
        ({"rope.freq_base": "big"}, ["should be float, found 'big'"]),
        ({"expert_group_count": 7}, ["160 experts in 7 groups", "must divide evenly"]),
        ({"expert_group_used_count": 9}, ["8 groups with 9 used"]),
        ({"expert_used_count": 61}, ["expert_used_count is 61", "hold fewer"]),
        ({"expert_gating_func": 2}, ["expert_gating_func 2 is not the softmax", "V3 or R1"]),
        ({"rope.scaling.type": "linear"}, ["'linear' is not supported"]),
        ({"embedding_length": 0}, ["embedding_length should be at least 1, found 0"]),
        ({"rope.dimension_count": 192}, ["192 values cannot end in 192 rotary ones"]),
    ],
)
def test_what_cannot_be_is_refused(override, words):
    with pytest.raises(GGUFError) as error:
        read(V2_5, override)
    for word in words:
        assert word in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(GGUFError, match=r"m\.gguf: the metadata key deepseek2\.attention\.kv_lora_rank is missing"):
        read(without(V2_5, "attention.kv_lora_rank"))


def test_vocabulary_size_from_the_file_where_the_key_is_absent():
    class Embedding:
        shape = (1000, 5120)

    assert read(without(V2_5, "vocab_size"), tensors={"token_embd.weight": Embedding}).vocab_size == 1000


def test_tied_embeddings():
    assert read(V2_5, tensors={"token_embd.weight": None}).tie_word_embeddings


def test_yarn_keeps_fast_pairs_and_slows_the_slow_ones():
    """The correction range of V2.5: pairs up to 10 as they are, from 23 on 40 times slower, a ramp between."""
    c = read(V2_5)
    plain = 10000.0 ** (-np.arange(32) / 32)
    slowed = plain / inverse_frequencies(c)
    np.testing.assert_allclose(slowed[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(slowed[23:], 40, rtol=1e-6)
    ramp = (np.arange(11, 23) - 10) / 13
    np.testing.assert_allclose(1 / slowed[11:23], 1 - ramp + ramp / 40, rtol=1e-6)


def test_without_yarn_the_frequencies_are_plain():
    c = read(without(V2_5, "rope.scaling.type"))
    assert c.yarn is None
    assert c.softmax_scale == 192**-0.5
    np.testing.assert_allclose(inverse_frequencies(c), 10000.0 ** (-np.arange(32) / 32), rtol=1e-6)
