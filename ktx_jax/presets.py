# SPDX-License-Identifier: Apache-2.0
"""The published DeepSeek-V2 models by name: sizes, metadata and tensors, without a file."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from ktx_jax.errors import KtxError
from ktx_jax.gguf.mixes import mix_type
from ktx_jax.gguf.writer import tensor_nbytes
from ktx_jax.model.config import Config, config_from_gguf

VOCAB_SIZE = 102400


@dataclass(frozen=True)
class Shape:
    """The sizes in which the DeepSeek-V2 models differ; the others are fixed below."""

    name: str
    layers: int
    hidden: int
    ffn: int
    expert_ffn: int
    heads: int
    q_lora: int | None
    experts: int
    groups: int
    groups_used: int
    expert_scale: float
    yarn_log_multiplier: float
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128


_V2 = Shape("DeepSeek-V2", 60, 5120, 12288, 1536, 128, 1536, 160, 8, 3, 16.0, 0.1)
SHAPES: dict[str, Shape] = {
    "v2-lite": Shape("DeepSeek-V2-Lite", 27, 2048, 10944, 1408, 16, None, 64, 1, 1, 1.0, 0.0707),
    "v2.5": replace(_V2, name="DeepSeek-V2.5"),
    "v2": _V2,
}
_EXPERTS_USED, _EXPERTS_SHARED = 6, 2


class PlannedTensor(NamedTuple):
    """A tensor of the file to be: GGUF name, row-major shape, type under the mix."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_nbytes(self.shape, self.ggml_type)


def resolve(shape: str | Shape, layers: int | None = None) -> Shape:
    """The sizes under a name, cut to the first `layers` layers.

    Raises `KtxError` for an unknown name, or more layers than the model has.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise KtxError(f"no shape named {shape!r}; there are {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    if layers is None:
        return shape
    if not 1 <= layers <= shape.layers:
        raise KtxError(f"{shape.name} has {shape.layers} layers; {layers} cannot be kept")
    return replace(shape, layers=layers)


def planned_tensors(shape: str | Shape, quant: str, layers: int | None = None) -> list[PlannedTensor]:
    """The tensors of a file of `shape` under the mix `quant`, in file order, the first `layers` layers only.

    The layout is that of current converters: `attn_kv_b` split into `attn_k_b` (transposed) and `attn_v_b`.
    Raises `KtxError` for an unknown shape or mix, or more layers than the model has.
    """
    shape = resolve(shape, layers)
    named = {"token_embd": (VOCAB_SIZE, shape.hidden)}
    for layer in range(shape.layers):
        block = _attention(shape) | (_dense(shape) if layer == 0 else _moe(shape))
        named |= {f"blk.{layer}.{part}": dims for part, dims in block.items()}
    named |= {"output_norm": (shape.hidden,), "output": (VOCAB_SIZE, shape.hidden)}
    return [
        PlannedTensor(f"{name}.weight", dims, mix_type(f"{name}.weight", dims, shape.layers, quant))
        for name, dims in named.items()
    ]


def _attention(s: Shape) -> dict[str, tuple[int, ...]]:
    key = s.nope + s.rope
    if s.q_lora is None:
        queries = {"attn_q": (s.heads * key, s.hidden)}
    else:
        queries = {
            "attn_q_a": (s.q_lora, s.hidden),
            "attn_q_a_norm": (s.q_lora,),
            "attn_q_b": (s.heads * key, s.q_lora),
        }
    return {
        "attn_norm": (s.hidden,),
        **queries,
        "attn_kv_a_mqa": (s.kv_lora + s.rope, s.hidden),
        "attn_kv_a_norm": (s.kv_lora,),
        "attn_k_b": (s.heads, s.kv_lora, s.nope),
        "attn_v_b": (s.heads, s.value, s.kv_lora),
        "attn_output": (s.hidden, s.heads * s.value),
        "ffn_norm": (s.hidden,),
    }


def _dense(s: Shape) -> dict[str, tuple[int, ...]]:
    return {"ffn_gate": (s.ffn, s.hidden), "ffn_up": (s.ffn, s.hidden), "ffn_down": (s.hidden, s.ffn)}


def _moe(s: Shape) -> dict[str, tuple[int, ...]]:
    up, down = (s.experts, s.expert_ffn, s.hidden), (s.experts, s.hidden, s.expert_ffn)
    shared = _EXPERTS_SHARED * s.expert_ffn
    return {
        "ffn_gate_inp": (s.experts, s.hidden),
        "ffn_gate_exps": up,
        "ffn_up_exps": up,
        "ffn_down_exps": down,
        "ffn_gate_shexp": (shared, s.hidden),
        "ffn_up_shexp": (shared, s.hidden),
        "ffn_down_shexp": (s.hidden, shared),
    }


def architecture_metadata(s: Shape) -> dict[str, Any]:
    """The GGUF metadata that describes the architecture: keys `deepseek2.*`."""
    values = {
        "block_count": s.layers,
        "context_length": 163840,
        "vocab_size": VOCAB_SIZE,
        "embedding_length": s.hidden,
        "feed_forward_length": s.ffn,
        "leading_dense_block_count": 1,
        "attention.head_count": s.heads,
        "attention.head_count_kv": 1,
        **({} if s.q_lora is None else {"attention.q_lora_rank": s.q_lora}),
        "attention.kv_lora_rank": s.kv_lora,
        "attention.key_length": s.kv_lora + s.rope,
        "attention.value_length": s.kv_lora,
        "attention.key_length_mla": s.nope + s.rope,
        "attention.value_length_mla": s.value,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_feed_forward_length": s.expert_ffn,
        "expert_count": s.experts,
        "expert_used_count": _EXPERTS_USED,
        "expert_shared_count": _EXPERTS_SHARED,
        "expert_weights_scale": s.expert_scale,
        "expert_gating_func": 1,
        "expert_group_count": s.groups,
        "expert_group_used_count": s.groups_used,
        "rope.dimension_count": s.rope,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": s.yarn_log_multiplier,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    return {f"deepseek2.{key}": value for key, value in values.items()}


def preset_config(shape: str | Shape, layers: int | None = None) -> Config:
    """The configuration of a model of `shape`, as its file's metadata would give it. Raises `KtxError` as `resolve`."""
    shape = resolve(shape, layers)
    tensors = {tensor.name: tensor for tensor in planned_tensors(shape, "f16")}
    return config_from_gguf(architecture_metadata(shape), tensors, file=shape.name)
