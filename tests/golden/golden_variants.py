# SPDX-License-Identifier: Apache-2.0
"""What the reference models are: sizes, file layouts and types. `make_golden.py` makes them, the tests read them."""

from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType as T

from ktx_jax.gguf.mixes import mix_type
from ktx_jax.tokenizer import CHARACTER_OF_BYTE

_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_SPECIALS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
_MERGES = ["Ġ t", "h e", "i n", "Ġ a", "Ġt he", "e r", "o n", "r e", "Ġ s"]
_BYTES = [c for b, c in sorted(CHARACTER_OF_BYTE.items()) if b not in _NEVER_IN_UTF8]
_WORDS = _SPECIALS + _BYTES + [merge.replace(" ", "") for merge in _MERGES]
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "deepseek-llm",
    "tokenizer.ggml.tokens": _WORDS,
    "tokenizer.ggml.token_type": [3] * len(_SPECIALS) + [1] * (len(_WORDS) - len(_SPECIALS)),
    "tokenizer.ggml.merges": _MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": _TEMPLATE,
}

FACTOR, ORIGINAL_CONTEXT, CONTEXT = 40.0, 4096, 163840


@dataclass(frozen=True)
class Variant:
    """One reference model: the sizes that vary, and how its file is laid out."""

    name: str
    types: tuple[T, ...] = (T.Q8_0,)  # of the matrices, in turn
    mix: str | None = None  # or a mix of llama.cpp's
    hidden: int = 32
    dense_width: int = 64
    q_rank: int | None = 32
    kv_rank: int = 32
    layers: int = 2  # the first is dense
    groups: int = 4
    groups_used: int = 2
    scale: float = 2.0
    mscale: float = 1.0
    old: bool = False  # attn_kv_b whole; neither `*_mla` nor group keys
    fused: bool = False  # the experts' gate and up in one tensor
    tied: bool = False
    parts: int = 1
    long: bool = False  # also a sequence past YaRN's original context
    vocab: int = len(_WORDS)
    heads: int = 2
    nope: int = 32
    rope: int = 16
    value: int = 32
    experts: int = 8
    used: int = 3
    shared: int = 2
    width: int = 32

    @property
    def override(self) -> dict[str, int] | None:
        """What the file does not say and its reader must."""
        used = {"expert_group_count": self.groups, "expert_group_used_count": self.groups_used}
        return used if self.old else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Row-major shapes by GGUF name, in file order."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            parts = self._attention() | (self._experts() if layer else self._mlp("", self.dense_width))
            shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
        shapes["output_norm.weight"] = (self.hidden,)
        return shapes if self.tied else shapes | {"output.weight": (self.vocab, self.hidden)}

    def _attention(self) -> dict[str, tuple[int, ...]]:
        h, d, r = self.heads, self.hidden, self.kv_rank
        queries = h * (self.nope + self.rope)
        parts = {"attn_norm": (d,), "ffn_norm": (d,), "attn_kv_a_norm": (r,), "attn_kv_a_mqa": (r + self.rope, d)}
        if self.q_rank is None:
            parts |= {"attn_q": (queries, d)}
        else:
            a, b = (self.q_rank, d), (queries, self.q_rank)
            parts |= {"attn_q_a": a, "attn_q_a_norm": (self.q_rank,), "attn_q_b": b}
        if self.old:
            parts |= {"attn_kv_b": (h * (self.nope + self.value), r)}
        else:
            parts |= {"attn_k_b": (h, r, self.nope), "attn_v_b": (h, self.value, r)}
        return parts | {"attn_output": (d, h * self.value)}

    def _mlp(self, suffix: str, width: int) -> dict[str, tuple[int, ...]]:
        sizes = {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}
        return {f"ffn_{part}{suffix}": shape for part, shape in sizes.items()}

    def _experts(self) -> dict[str, tuple[int, ...]]:
        parts: dict[str, tuple[int, ...]] = {"ffn_gate_inp": (self.experts, self.hidden)}
        stacks = {name: (self.experts, *shape) for name, shape in self._mlp("_exps", self.width).items()}
        if self.fused:
            del stacks["ffn_gate_exps"], stacks["ffn_up_exps"]
            stacks["ffn_gate_up_exps"] = (self.experts, 2 * self.width, self.hidden)
        return parts | stacks | self._mlp("_shexp", self.shared * self.width)

    def kind(self, name: str, shape: tuple[int, ...]) -> T:
        """The type of a tensor: norms and router float32, the rest by the mix or in turn."""
        if self.mix is not None:
            return mix_type(name, shape, self.layers, self.mix)
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return T.F32
        return self.types[list(self.shapes()).index(name) % len(self.types)]

    def gain(self, name: str) -> float:
        """The deviation of the weight's outputs for inputs of deviation 1."""
        embedding = 1.0 if self.tied else self.hidden**0.5
        gains = {"attn_q.": 2.0, "attn_q_b.": 2.0, "ffn_gate_inp.": 1.5, "token_embd.": embedding}
        return next((gain for part, gain in gains.items() if part in name), 1.0)

    def metadata(self) -> dict[str, Any]:
        """The GGUF metadata, as the converters of llama.cpp write it."""
        keys: dict[str, Any] = {
            "vocab_size": self.vocab,
            "context_length": CONTEXT,
            "embedding_length": self.hidden,
            "block_count": self.layers,
            "leading_dense_block_count": 1,
            "feed_forward_length": self.dense_width,
            "expert_feed_forward_length": self.width,
            "expert_count": self.experts,
            "expert_used_count": self.used,
            "expert_shared_count": self.shared,
            "expert_weights_scale": self.scale,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.heads if self.old else 1,
            "attention.kv_lora_rank": self.kv_rank,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.key_length": self.nope + self.rope if self.old else self.kv_rank + self.rope,
            "attention.value_length": self.value if self.old else self.kv_rank,
            "rope.dimension_count": self.rope,
            "rope.freq_base": 10000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": FACTOR,
            "rope.scaling.original_context_length": ORIGINAL_CONTEXT,
            "rope.scaling.yarn_log_multiplier": 0.1 * self.mscale,
        }
        if self.q_rank is not None:
            keys["attention.q_lora_rank"] = self.q_rank
        if not self.old:
            keys |= {
                "attention.key_length_mla": self.nope + self.rope,
                "attention.value_length_mla": self.value,
                "expert_group_count": self.groups,
                "expert_group_used_count": self.groups_used,
                "expert_gating_func": 1,
            }
        named = {f"deepseek2.{key}": value for key, value in keys.items()}
        return {"general.architecture": "deepseek2", "general.name": self.name} | named | VOCABULARY

    def hugging_face(self) -> dict[str, Any]:
        """The same, as arguments of transformers' `DeepseekV2Config`."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "moe_intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_shared_experts": self.shared,
            "n_routed_experts": self.experts,
            "routed_scaling_factor": self.scale,
            "kv_lora_rank": self.kv_rank,
            "q_lora_rank": self.q_rank,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value,
            "qk_nope_head_dim": self.nope,
            "topk_method": "group_limited_greedy" if self.groups > 1 else "greedy",
            "n_group": self.groups,
            "topk_group": self.groups_used,
            "num_experts_per_tok": self.used,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": FACTOR,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": self.mscale,
                "mscale_all_dim": self.mscale,
                "original_max_position_embeddings": ORIGINAL_CONTEXT,
            },
        }


VARIANTS = (
    Variant("grouped", mix="q4_k_m", hidden=256, dense_width=256, q_rank=64, kv_rank=64, layers=3, long=True),
    Variant(
        "lite",
        q_rank=None,
        groups=1,
        groups_used=1,
        scale=1.0,
        mscale=0.707,
        layers=3,
        types=(T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.IQ4_NL, T.F16, T.BF16),
    ),
    Variant("old", old=True),
    Variant("split", parts=2),
    Variant("fused", fused=True, types=(T.Q8_0, T.Q5_0)),
    Variant("tied", tied=True, types=(T.Q8_0, T.Q4_0)),
)
