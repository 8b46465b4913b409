# SPDX-License-Identifier: Apache-2.0
"""The tree of modules that ktransformers' rules walk, with the classes of each, and its operators under our names."""

from typing import NamedTuple

from ktx_jax.model.config import Config

_TORCH = "torch.nn."
# What each kind of module is an instance of: torch's classes by their whole names, the model's by the last part.
CLASSES: dict[str, frozenset[str]] = {
    "causal_lm": frozenset({"DeepseekV2ForCausalLM", "DeepseekV2PreTrainedModel"}),
    "model": frozenset({"DeepseekV2Model", "DeepseekV2PreTrainedModel"}),
    "layers": frozenset({"torch.nn.ModuleList"}),
    "layer": frozenset({"DeepseekV2DecoderLayer"}),
    "attention": frozenset({"DeepseekV2Attention"}),
    "rotary": frozenset({"DeepseekV2YarnRotaryEmbedding", "DeepseekV2RotaryEmbedding"}),
    "mlp": frozenset({"DeepseekV2MLP"}),
    "moe": frozenset({"DeepseekV2MoE"}),
    "gate": frozenset({"MoEGate"}),
    "experts": frozenset({"torch.nn.ModuleList"}),
    "norm": frozenset({"DeepseekV2RMSNorm"}),
    "linear": frozenset({"torch.nn.Linear"}),
    "embedding": frozenset({"torch.nn.Embedding"}),
    "activation": frozenset({"torch.nn.SiLU"}),
}
KNOWN_CLASSES = frozenset({"torch.nn.Module"}).union(*CLASSES.values())

# The kind of weight an operator computes with, and the implementation here.
OPERATORS = {
    "KLinearMarlin": ("linear", "pallas"),
    "KLinearQ8": ("linear", "pallas"),
    "KLinearTorch": ("linear", "xla"),
    "KLinearCPUInfer": ("linear", "ffi"),
    "KExpertsMarlin": ("experts", "pallas"),
    "KExpertsTorch": ("experts", "xla"),
    "KExpertsCPU": ("experts", "ffi"),
}


def class_name(dotted: str) -> str:
    """A class as `CLASSES` has it: torch's in full, others without the module they are imported from."""
    return dotted if dotted.startswith(_TORCH) else dotted.rpartition(".")[2]


class Module(NamedTuple):
    """A module of the Hugging Face model: its path and its kind."""

    path: str
    kind: str


def is_a(kind: str, name: str) -> bool:
    """Whether modules of a kind are instances of the class `name`, as `class_name` gives it."""
    return name == f"{_TORCH}Module" or name in CLASSES[kind]


def children(module: Module, config: Config) -> list[Module]:
    """The modules directly inside `module`."""
    if module.kind in ("linear", "activation"):
        return []
    prefix = f"{module.path}." if module.path else ""
    return [Module(prefix + name, kind) for name, kind in _parts(module, config)]


def _parts(module: Module, c: Config) -> list[tuple[str, str]]:
    match module.kind:
        case "causal_lm":
            return [("model", "model"), ("lm_head", "linear")]
        case "model":
            return [("embed_tokens", "embedding"), ("layers", "layers"), ("norm", "norm")]
        case "layers":
            return [(str(i), "layer") for i in range(c.num_hidden_layers)]
        case "layer":
            moe = c.is_moe(int(module.path.rpartition(".")[2]))
            norms = [("input_layernorm", "norm"), ("post_attention_layernorm", "norm")]
            return [("self_attn", "attention"), ("mlp", "moe" if moe else "mlp"), *norms]
        case "attention":
            return _attention(c)
        case "moe":
            shared = [("shared_experts", "mlp")] if c.n_shared_experts else []
            return [("experts", "experts"), ("gate", "gate"), *shared]
        case "experts":
            return [(str(i), "mlp") for i in range(c.n_routed_experts)]
        case "mlp":
            return [*((name, "linear") for name in ("gate_proj", "up_proj", "down_proj")), ("act_fn", "activation")]
    return []


def _attention(c: Config) -> list[tuple[str, str]]:
    if c.q_lora_rank is None:
        query = [("q_proj", "linear")]
    else:
        query = [("q_a_proj", "linear"), ("q_a_layernorm", "norm"), ("q_b_proj", "linear")]
    latent = [("kv_a_proj_with_mqa", "linear"), ("kv_a_layernorm", "norm"), ("kv_b_proj", "linear")]
    return [*query, *latent, ("o_proj", "linear"), ("rotary_emb", "rotary")]
