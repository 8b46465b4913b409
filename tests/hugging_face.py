# SPDX-License-Identifier: Apache-2.0
"""Any small DeepSeek-V2 file as a Hugging Face model and tokenizer: by gguf-py's reader and transformers alone."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from ktx_jax.llm import load_config
from ktx_jax.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).with_name("golden")))  # a script's folder: its modules know each other by name
from make_golden import read, state_dict


def hugging_face_model(path: Path) -> tuple[DeepseekV2ForCausalLM, PreTrainedTokenizerFast]:
    """The file's weights in float32, eager attention; the tokenizer puts the beginning-of-text token first."""
    c = load_config(path)
    weights = read([path])
    layout = SimpleNamespace(
        tied=c.tie_word_embeddings, layers=c.num_hidden_layers, fused="blk.1.ffn_gate_up_exps.weight" in weights,
        old="blk.0.attn_k_b.weight" not in weights, kv_rank=c.kv_lora_rank,
    )  # fmt: skip
    config = DeepseekV2Config(**_config(c), attn_implementation="eager", dtype="float32")
    model = DeepseekV2ForCausalLM(config).eval()
    model.load_state_dict(state_dict(layout, weights))  # type: ignore[arg-type]
    return model, _tokenizer(path)


def _config(c: Any) -> dict[str, Any]:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank",
        "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "n_group", "topk_group",
        "num_experts_per_tok", "first_k_dense_replace", "norm_topk_prob", "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    yarn = c.yarn
    return {name: getattr(c, name) for name in same} | {
        "num_key_value_heads": c.num_attention_heads,
        "topk_method": "group_limited_greedy" if c.n_group > 1 else "greedy",
        "tie_word_embeddings": c.tie_word_embeddings,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": c.rope_theta,
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": 10 * yarn.log_multiplier,
            "mscale_all_dim": 10 * yarn.log_multiplier,
            "original_max_position_embeddings": yarn.original_context,
        },
    }


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers.decoders import ByteLevel
    from tokenizers.processors import TemplateProcessing

    ours = Tokenizer.from_gguf(path)
    assert ours.bos_id is not None
    assert ours.eos_id is not None
    bos, eos = (ours.token_bytes(i).decode() for i in (ours.bos_id, ours.eos_id))
    encoder = type(ours._with_special).from_str(ours._with_special.to_str())
    encoder.decoder = ByteLevel()
    encoder.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ours.bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=encoder, bos_token=bos, eos_token=eos, pad_token=eos)
