# SPDX-License-Identifier: Apache-2.0
"""GGUF tensor names and the module paths they stand for.

A module path is the Hugging Face one without the trailing ``.weight``: every module of this project holds one
parameter. The paths are the names that rules, plans and errors use.
"""

import re

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.([a-z_]+)\.weight")
_LAYER_PATH = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TOP_OF_PATH = {path: name for name, path in _TOP.items()}
_BLOCK_OF_PATH = {path: name for name, path in _BLOCK.items()}


def module_path(tensor_name: str) -> str | None:
    """The module path of a GGUF tensor name, or None for a name that this architecture does not have."""
    if match := _BLOCK_NAME.fullmatch(tensor_name):
        path = _BLOCK.get(match[2])
        return path and f"model.layers.{int(match[1])}.{path}"
    return _TOP.get(tensor_name.removesuffix(".weight"))


def tensor_name(path: str) -> str:
    """The GGUF tensor name of a module path. Raises KeyError for a path that no GGUF tensor stands for."""
    if match := _LAYER_PATH.fullmatch(path):
        return f"blk.{match[1]}.{_BLOCK_OF_PATH[match[2]]}.weight"
    return f"{_TOP_OF_PATH[path]}.weight"
