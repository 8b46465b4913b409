# SPDX-License-Identifier: Apache-2.0
"""Writes the trained embedded model as GGUF files, in llama.cpp's new layout and its type mixes."""

from pathlib import Path

import numpy as np
from tiny_model import CONFIG
from tiny_tokenizer import tokenizer_metadata
from tokenizers import Tokenizer

from ktx_jax.gguf.mixes import MIXES, mix_type
from ktx_jax.gguf.names import tensor_name
from ktx_jax.gguf.quantize import quantize
from ktx_jax.gguf.writer import TensorSource, write_gguf

EXPORTED_MIXES = ("q8_0", "q4_k_m")


def model_metadata() -> dict:
    """The `deepseek2.*` keys that describe `CONFIG`."""
    c = CONFIG
    assert c.yarn is not None
    keys = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "leading_dense_block_count": c.first_k_dense_replace,
        "feed_forward_length": c.intermediate_size,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
        "expert_gating_func": 1,
        "expert_weights_scale": c.routed_scaling_factor,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.latent_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": c.yarn.factor,
        "rope.scaling.original_context_length": c.yarn.original_context,
        "rope.scaling.yarn_log_multiplier": c.yarn.log_multiplier,
    }
    return {f"deepseek2.{key}": value for key, value in keys.items()}


def file_metadata(tokenizer: Tokenizer, mix: str) -> dict:
    """All metadata of one exported file."""
    return {
        "general.architecture": "deepseek2",
        "general.type": "model",
        "general.name": "ktx-jax tiny",
        "general.description": "A demonstration model trained on Python's own documentation",
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "general.file_type": int(MIXES[mix].file_type),
        "general.quantization_version": 2,
        **model_metadata(),
        **tokenizer_metadata(tokenizer),
    }


def sources(params: dict[str, np.ndarray], mix: str) -> list[TensorSource]:
    """The model's tensors under GGUF names, quantized by the mix."""
    out = []
    for path, values in params.items():
        name = tensor_name(path)
        # Tied embeddings are the output matrix too, and get its type.
        rule_name = "output.weight" if CONFIG.tie_word_embeddings and path == "model.embed_tokens" else name
        kind = mix_type(rule_name, values.shape, CONFIG.num_hidden_layers, mix)
        out.append(TensorSource(name, values.shape, kind, quantize(values, kind)))
    return out


def export(params: dict[str, np.ndarray], tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Writes `tiny-<mix>.gguf` for each exported mix; returns the files."""
    files = []
    for mix in EXPORTED_MIXES:
        file = folder / f"tiny-{mix}.gguf"
        write_gguf(file, file_metadata(tokenizer, mix), sources(params, mix))
        files.append(file)
    return files
