# SPDX-License-Identifier: Apache-2.0
"""The model as rules see it: every parameter's path, logical shape and type, and the modules without parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from gguf import GGMLQuantizationType

from ktx_jax.gguf.mixes import mix_type
from ktx_jax.gguf.names import tensor_name
from ktx_jax.gguf.reader import GGUF
from ktx_jax.model.config import Config
from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.granules import stored_type
from ktx_jax.sharding.sources import find_source

Shape = tuple[int, ...]
Types = Mapping[str, GGMLQuantizationType]

EXPERTS = "mlp.experts"
ROTARY = "self_attn.rotary_emb"


@dataclass(frozen=True)
class Parameter:
    """A parameter, by its module path.

    Attributes:
      shape: logical; the input dimension last.
      ggml_type: as it lies in the file.
      layer: its decoder layer, or None.
      kind: the path inside its layer, or the whole path outside the layers.
    """

    path: str
    shape: Shape
    ggml_type: GGMLQuantizationType

    @cached_property
    def layer(self) -> int | None:
        return split_layer(self.path)[0]

    @cached_property
    def kind(self) -> str:
        return split_layer(self.path)[1]

    @cached_property
    def is_expert(self) -> bool:
        """Whether it is one of the routed experts' stacks."""
        return self.kind.startswith(f"{EXPERTS}.")

    @cached_property
    def stored_type(self) -> GGMLQuantizationType:
        """What it is in memory: vectors and routers are float32, rare types become Q8_0."""
        if len(self.shape) == 1 or self.kind == "mlp.gate":
            return GGMLQuantizationType.F32
        return stored_type(self.ggml_type)


@dataclass(frozen=True)
class Inventory:
    """All that rules can speak of in a model, in the order in which it computes."""

    config: Config
    parameters: tuple[Parameter, ...]

    @cached_property
    def by_path(self) -> Mapping[str, Parameter]:
        return {parameter.path: parameter for parameter in self.parameters}

    @cached_property
    def rotary_paths(self) -> tuple[str, ...]:
        """The rotary embeddings: modules without parameters, which rules may place and give operators."""
        return tuple(f"model.layers.{i}.{ROTARY}" for i in range(self.config.num_hidden_layers))

    @cached_property
    def paths(self) -> tuple[str, ...]:
        return (*self.by_path, *self.rotary_paths)


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Every parameter's module path and logical shape, in the order in which they are used."""
    c, size = config, config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens": (c.vocab_size, size)}
    for layer in range(c.num_hidden_layers):
        parts = _layer(c, c.is_moe(layer))
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    shapes["model.norm"] = (size,)
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.vocab_size, size)
    return shapes


def _layer(c: Config, moe: bool) -> dict[str, Shape]:
    size, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    queries = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        query: dict[str, Shape] = {"q_proj": (queries, size)}
    else:
        low = c.q_lora_rank
        query = {"q_a_proj": (low, size), "q_a_layernorm": (low,), "q_b_proj": (queries, low)}
    k_b = (rank, c.qk_nope_head_dim)
    attention: dict[str, Shape] = {
        **query,
        "kv_a_proj_with_mqa": (c.latent_dim, size),
        "kv_a_layernorm": (rank,),
        "k_b_proj": (heads, *(k_b if c.k_b_transposed else k_b[::-1])),
        "v_b_proj": (heads, c.v_head_dim, rank),
        "o_proj": (size, heads * c.v_head_dim),
    }
    return {
        "input_layernorm": (size,),
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        "post_attention_layernorm": (size,),
        **(_moe(c) if moe else _mlp("mlp", size, c.intermediate_size)),
    }


def _mlp(name: str, size: int, width: int, lead: Shape = ()) -> dict[str, Shape]:
    return {
        f"{name}.gate_proj": (*lead, width, size),
        f"{name}.up_proj": (*lead, width, size),
        f"{name}.down_proj": (*lead, size, width),
    }


def _moe(c: Config) -> dict[str, Shape]:
    shared = c.n_shared_experts * c.moe_intermediate_size
    return {
        "mlp.gate": (c.n_routed_experts, c.hidden_size),
        **_mlp(EXPERTS, c.hidden_size, c.moe_intermediate_size, (c.n_routed_experts,)),
        **(_mlp("mlp.shared_experts", c.hidden_size, shared) if shared else {}),
    }


def mix_types(config: Config, mix: str) -> dict[str, GGMLQuantizationType]:
    """The type that each parameter has in a file of the mix `mix` (`q4_k_m`, ...). Raises `KtxError` for another."""
    layers = config.num_hidden_layers
    return {path: mix_type(tensor_name(path), shape, layers, mix) for path, shape in parameter_shapes(config).items()}


def file_types(gguf: GGUF, config: Config) -> dict[str, GGMLQuantizationType]:
    """The type of each parameter in a file, from its headers. Raises `GGUFError` for missing or misshapen tensors."""
    return {path: find_source(gguf, config, path, shape).ggml_type for path, shape in parameter_shapes(config).items()}


def inventory(config: Config, types: Types | str) -> Inventory:
    """What rules can speak of: `config`'s parameters, with types from a file or under a mix's name."""
    if isinstance(types, str):
        types = mix_types(config, types)
    shapes = parameter_shapes(config)
    return Inventory(config, tuple(Parameter(path, shape, types[path]) for path, shape in shapes.items()))
