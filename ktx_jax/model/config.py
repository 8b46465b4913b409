# SPDX-License-Identifier: Apache-2.0
"""The model's configuration, read from GGUF metadata before any weight is touched."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from ktx_jax.gguf.errors import GGUFError

log = logging.getLogger("ktx_jax")

ARCHITECTURE = "deepseek2"
# The routing groups of DeepSeek-V2 (arXiv:2405.04434, section 2.2.2 and appendix): files converted before October 2025
# do not carry them, and only the models with 160 experts have groups.
_V2_EXPERTS, _V2_GROUPS, _V2_GROUPS_USED = 160, 8, 3


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv:2309.00071), with DeepSeek's softmax temperature."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0  # 0.1 * mscale_all_dim; mscale = mscale_all_dim, so cos and sin keep magnitude 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of a DeepSeek-V2 model. Field names are those of the Hugging Face configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    k_b_transposed: bool = True  # new files hold k_b as [H, R, N]; in old ones it lies in kv_b as [H, N, R]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values that the cache holds for a token in a layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(qk_head_dim), times YaRN's temperature squared (DeepSeek-V2's reference code)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None:
            scale *= (1.0 + self.yarn.log_multiplier * math.log(self.yarn.factor)) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def __post_init__(self) -> None:
        if self.n_routed_experts and (self.n_routed_experts % self.n_group or not 1 <= self.topk_group <= self.n_group):
            raise GGUFError(
                f"{self.n_routed_experts} experts in {self.n_group} groups with {self.topk_group} used: the experts "
                "must divide evenly into the groups, and 1 to all groups may be used "
                "(override expert_group_count and expert_group_used_count)"
            )
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise GGUFError(
                f"expert_used_count is {self.num_experts_per_tok}, but {self.topk_group} groups of "
                f"{self.n_routed_experts // self.n_group} experts hold fewer"
            )


class _Keys:
    """Typed look-up of `deepseek2.*` keys, with the user's overrides laid over the file's."""

    def __init__(self, metadata: Mapping[str, Any], override: Mapping[str, Any], file: str):
        self.metadata, self.file = metadata, file
        self.override = {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in override.items()}
        self.asked: set[str] = set()

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        self.asked.add(key)
        full = f"{ARCHITECTURE}.{key}"
        value = self.override.get(key, self.metadata.get(full))
        where = "override" if key in self.override else self.file
        if value is None:
            if default is ...:
                raise GGUFError(f"{self.file}: the metadata key {full} is missing; is the file complete?")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GGUFError(f"{where}: {full} should be {kind.__name__}, found {value!r}")
        if kind is float and not math.isfinite(value):
            raise GGUFError(f"{where}: {full} should be a finite number, found {value!r}")
        return value

    def size(self, key: str, default: Any = ..., least: int = 1) -> Any:
        value = self.get(key, int, default)
        if value is not None and value < least:
            raise GGUFError(f"{self.file}: {ARCHITECTURE}.{key} should be at least {least}, found {value}")
        return value

    def check_overrides(self) -> None:
        if unknown := sorted(set(self.override) - self.asked):
            raise GGUFError(
                f"override names unknown keys: {', '.join(unknown)}; the keys are {', '.join(sorted(self.asked))}"
            )


def _yarn(keys: _Keys) -> Yarn | None:
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.get("rope.scaling.factor", float, 1.0)
    original = keys.size("rope.scaling.original_context_length", None)
    beta_fast = keys.get("rope.scaling.yarn_beta_fast", float, 32.0)
    beta_slow = keys.get("rope.scaling.yarn_beta_slow", float, 1.0)
    log_multiplier = keys.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if kind == "none" or (kind == "yarn" and factor == 1.0):
        return None
    if kind != "yarn":
        raise GGUFError(f"{keys.file}: rope.scaling.type {kind!r} is not supported; DeepSeek-V2 uses yarn")
    if factor <= 0 or original is None:
        raise GGUFError(f"{keys.file}: yarn needs a positive factor and rope.scaling.original_context_length")
    return Yarn(factor, original, beta_fast, beta_slow, log_multiplier)


def _groups(keys: _Keys, experts: int) -> tuple[int, int]:
    count = keys.size("expert_group_count", None, least=0)
    used = keys.size("expert_group_used_count", None, least=0)
    if count is None and used is None and experts == _V2_EXPERTS:
        log.warning(
            "%s: no expert group keys and %d experts: taking DeepSeek-V2's %d groups with %d used; override "
            "expert_group_count and expert_group_used_count if that is wrong",
            keys.file, experts, _V2_GROUPS, _V2_GROUPS_USED,
        )  # fmt: skip
        return _V2_GROUPS, _V2_GROUPS_USED
    count = count or 1
    return count, used or count


def _heads(keys: _Keys) -> dict[str, int]:
    """Head sizes. Files from 2025 on give the expanded sizes as `*_mla`; older ones as key_length itself."""
    rope = keys.size("rope.dimension_count")
    key = keys.size("attention.key_length_mla", None) or keys.size("attention.key_length")
    value = keys.size("attention.value_length_mla", None) or keys.size("attention.value_length")
    if key <= rope or rope % 2:
        raise GGUFError(
            f"{keys.file}: a key of {key} values cannot end in {rope} rotary ones (they must be even and fewer)"
        )
    return {"qk_nope_head_dim": key - rope, "qk_rope_head_dim": rope, "v_head_dim": value}


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Mapping[str, Any],
    *,
    override: Mapping[str, Any] | None = None,
    file: str = "GGUF file",
) -> Config:
    """Reads the configuration from GGUF metadata (keys `deepseek2.*`).

    Args:
      metadata: the file's key-value pairs.
      tensor_names: the file's tensors by name (only which are there, and the embedding's shape, are looked at).
      override: values laid over the file's, keys with or without the `deepseek2.` prefix.
      file: the name used in errors.

    Raises:
      GGUFError: a key is missing, has the wrong type or an impossible value, or an override names no key.
    """
    keys = _Keys(metadata, override or {}, file)
    experts = keys.size("expert_count", 0, least=0)
    gating = keys.get("expert_gating_func", int, 1)
    if gating not in (0, 1):
        raise GGUFError(
            f"{file}: expert_gating_func {gating} is not the softmax routing of DeepSeek-V2; this looks like a "
            "DeepSeek-V3 or R1 file, which is not supported"
        )
    groups, groups_used = _groups(keys, experts)
    layers = keys.size("block_count")
    tokens = metadata.get("tokenizer.ggml.tokens")
    embedding = tensor_names.get("token_embd.weight")
    config = Config(
        vocab_size=keys.size("vocab_size", embedding.shape[0] if embedding else (tokens and len(tokens))),
        hidden_size=keys.size("embedding_length"),
        intermediate_size=keys.size("feed_forward_length"),
        moe_intermediate_size=keys.size("expert_feed_forward_length") if experts else 0,
        num_hidden_layers=layers,
        first_k_dense_replace=min(keys.size("leading_dense_block_count", 0, least=0), layers),
        num_attention_heads=keys.size("attention.head_count"),
        q_lora_rank=keys.size("attention.q_lora_rank", None),
        kv_lora_rank=keys.size("attention.kv_lora_rank"),
        **_heads(keys),
        n_routed_experts=experts,
        num_experts_per_tok=keys.size("expert_used_count") if experts else 0,
        n_shared_experts=keys.size("expert_shared_count", 0, least=0) if experts else 0,
        n_group=groups,
        topk_group=groups_used,
        routed_scaling_factor=keys.get("expert_weights_scale", float, 1.0) or 1.0,
        norm_topk_prob=keys.get("expert_weights_norm", bool, False),
        rms_norm_eps=keys.get("attention.layer_norm_rms_epsilon", float),
        rope_theta=keys.get("rope.freq_base", float, 10000.0),
        yarn=_yarn(keys),
        max_position_embeddings=keys.size("context_length"),
        tie_word_embeddings="output.weight" not in tensor_names,
        k_b_transposed="blk.0.attn_kv_b.weight" not in tensor_names or "blk.0.attn_k_b.weight" in tensor_names,
    )
    keys.check_overrides()
    return config
