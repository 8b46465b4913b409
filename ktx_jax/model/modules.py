# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 as Flax NNX modules under Hugging Face names (arXiv:2405.04434).

Letters: T tokens, D model, H heads, R latent rank, N nope, P rope, V value, E experts, F expert width, k top-k.
Each module that has a parameter has just one, `weight`; its path without `.weight` is the name rules and plans use.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax import ops
from ktx_jax.model.cache import Cache, Run, write
from ktx_jax.model.config import Config
from ktx_jax.model.rope import cos_sin, rotate

_INIT_STD = 0.02


class Linear(nnx.Module):
    """A weight whose last axis is the input dimension: `[out, in]`, or a stack of such."""

    def __init__(self, *shape: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), shape) * _INIT_STD)

    def __call__(self, x: Float[Array, "T K"], *, precise: bool = False) -> Float[Array, "T N"]:
        return ops.matmul(x, self.weight.get_value(), precise=precise)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps
        self.implementation = "xla"

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return ops.rms_norm(x, self.weight.get_value(), self.eps, implementation=self.implementation)


class Embedding(nnx.Module):
    def __init__(self, vocab: int, size: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (vocab, size)) * _INIT_STD)

    def __call__(self, tokens: Int[Array, " T"], dtype: Any) -> Float[Array, "T D"]:
        return ops.embedding_rows(self.weight.get_value(), tokens, dtype)


class Attention(nnx.Module):
    """Multi-head latent attention (section 2.1), absorbed: k_b goes into the query, v_b follows the mixed latents.

    What makes, asks and reads the latent is `precise`: an error there is met again by every later token, and these
    products are a few hundredths of the model's.
    """

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.config = c
        self.implementation = "xla"  # of the attention itself; that of a product follows from how its weight lies
        queries = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(queries, c.hidden_size, rngs=rngs)
        else:
            self.q_a_proj = Linear(c.q_lora_rank, c.hidden_size, rngs=rngs)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
            self.q_b_proj = Linear(queries, c.q_lora_rank, rngs=rngs)
        self.kv_a_proj_with_mqa = Linear(c.latent_dim, c.hidden_size, rngs=rngs)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        k_b = (c.kv_lora_rank, c.qk_nope_head_dim)
        self.k_b_proj = Linear(c.num_attention_heads, *(k_b if c.k_b_transposed else k_b[::-1]), rngs=rngs)
        self.v_b_proj = Linear(c.num_attention_heads, c.v_head_dim, c.kv_lora_rank, rngs=rngs)
        self.o_proj = Linear(c.hidden_size, c.num_attention_heads * c.v_head_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], pages: jax.Array, run: Run, cos: jax.Array, sin: jax.Array
    ) -> tuple[Float[Array, "T D"], jax.Array]:
        c = self.config
        with jax.named_scope("query"):
            q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            q = q.reshape(-1, c.num_attention_heads, c.qk_head_dim)  # [T, H, N + P]
            q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
            q_rope = rotate(q_rope, cos, sin)
            q_latent = ops.head_matmul(
                q_nope, self.k_b_proj.weight.get_value(), transposed=not c.k_b_transposed, precise=True
            )
        with jax.named_scope("latent"):
            latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x, precise=True), [c.kv_lora_rank], axis=-1)
            row = jnp.concatenate([self.kv_a_layernorm(latent), rotate(k_rope, cos, sin)], axis=-1)  # [T, R + P]
            pages = write(pages, row, run, implementation=self.implementation)
        with jax.named_scope("attend"):
            mixed = ops.mla_attention(
                q_latent, q_rope, pages, run.block_table, run.sequence, run.positions,
                scale=c.softmax_scale, tile=run.tile, implementation=self.implementation,
            )  # fmt: skip
            values = ops.head_matmul(mixed, self.v_b_proj.weight.get_value(), precise=True)  # [T, H, V]
        return self.o_proj(values.reshape(x.shape[0], -1)), pages


class MLP(nnx.Module):
    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, size, rngs=rngs)
        self.up_proj = Linear(width, size, rngs=rngs)
        self.down_proj = Linear(size, width, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        weights = (m.weight.get_value() for m in (self.gate_proj, self.up_proj, self.down_proj))
        return ops.swiglu(x, *weights)


class Experts(nnx.Module):
    """The routed experts' stacked weights."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        count, width, size = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_proj = Linear(count, width, size, rngs=rngs)
        self.up_proj = Linear(count, width, size, rngs=rngs)
        self.down_proj = Linear(count, size, width, rngs=rngs)

    def __call__(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        stacks = (m.weight.get_value() for m in (self.gate_proj, self.up_proj, self.down_proj))
        return ops.experts(x, ids, weights, *stacks)


class Router(nnx.Module):
    """Group-limited greedy top-k over the float32 softmax of all experts (section 2.2.2; group score: its best)."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.config = c
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (c.n_routed_experts, c.hidden_size)) * _INIT_STD)

    def scores(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        return jax.nn.softmax(ops.matmul(x.astype(jnp.float32), self.weight.get_value()), axis=-1)

    def __call__(self, x: Float[Array, "T D"]) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        c, scores = self.config, self.scores(x)
        tokens, experts = scores.shape
        kept = scores
        if c.topk_group < c.n_group:
            groups = scores.reshape(tokens, c.n_group, -1)
            _, best = jax.lax.top_k(groups.max(axis=-1), c.topk_group)
            chosen = jax.nn.one_hot(best, c.n_group, dtype=bool).any(axis=1)
            kept = jnp.where(chosen[..., None], groups, 0.0).reshape(tokens, experts)
        weights, ids = jax.lax.top_k(kept, c.num_experts_per_tok)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return ids, weights * c.routed_scaling_factor


class MoE(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.gate = Router(c, rngs)
        self.experts = Experts(c, rngs)
        shared = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = MLP(c.hidden_size, shared, rngs) if shared else None

    def __call__(self, x: Float[Array, "T D"], live: jax.Array) -> Float[Array, "T D"]:
        with jax.named_scope("route"):
            ids, weights = self.gate(x)
            ids = jnp.where(live[:, None], ids, -1)
        with jax.named_scope("experts"):
            out = self.experts(x, ids, weights)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class DecoderLayer(nnx.Module):
    def __init__(self, c: Config, layer: int, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c, rngs) if c.is_moe(layer) else MLP(c.hidden_size, c.intermediate_size, rngs)

    def __call__(
        self, x: Float[Array, "T D"], pages: jax.Array, run: Run, cos: jax.Array, sin: jax.Array
    ) -> tuple[Float[Array, "T D"], jax.Array]:
        mixed, pages = self.self_attn(self.input_layernorm(x), pages, run, cos, sin)
        x = x + mixed
        h = self.post_attention_layernorm(x)
        x = x + (self.mlp(h, run.positions >= 0) if isinstance(self.mlp, MoE) else self.mlp(h))
        return x, pages


@jax.jit(static_argnums=0)
def _layer(graphdef: Any, state: Any, x: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
    """One layer as a jitted function: layers that differ in nothing but values are traced and lowered once."""
    return nnx.merge(graphdef, state)(x, *rest)


class DeepseekV2Model(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.config = c
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, rngs)
        self.layers = nnx.List(DecoderLayer(c, i, rngs) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def __call__(self, run: Run, cache: Cache, dtype: Any) -> tuple[Float[Array, "T D"], Cache]:
        x = self.embed_tokens(run.tokens, dtype)
        cos, sin = cos_sin(self.config, run.positions)
        pages = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{i}"):
                x, layer_pages = _layer(*nnx.split(layer), x, cache[i], run, cos, sin)
            pages.append(layer_pages)
        return x, tuple(pages)


class DeepseekV2ForCausalLM(nnx.Module):
    """The whole model. Parameters are float32 arrays as made here, and `QuantizedArray`s once loaded from a file."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.model = DeepseekV2Model(config, rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.vocab_size, config.hidden_size, rngs=rngs)

    def __call__(
        self, run: Run, cache: Cache, logits_at: Int[Array, " L"], *, dtype: Any = jnp.float32
    ) -> tuple[Float[Array, "L vocab"], Cache]:
        """Adds the run to the cache; float32 logits of the run's tokens `logits_at`."""
        x, cache = self.model(run, cache, dtype)
        return self.head(x[logits_at]), cache

    def head(self, x: Float[Array, "L D"]) -> Float[Array, "L vocab"]:
        with jax.named_scope("lm_head"):
            weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight.get_value()
            return ops.matmul(self.model.norm(x), weight, dtype=jnp.float32)


def causal_logits(
    model: DeepseekV2ForCausalLM, tokens: Int[Array, " T"], *, dtype: Any = jnp.float32
) -> Float[Array, "T vocab"]:
    """Logits of every position of one whole sequence, with no cache kept: pure, differentiable, can be mapped."""
    count = tokens.shape[0]
    at = jnp.arange(count)
    zero = jnp.zeros(count, jnp.int32)
    run = Run(tokens, at, zero, jnp.zeros((1, 1), jnp.int32), tile=count)
    cache = tuple(jnp.zeros((1, count, model.config.latent_dim), dtype) for _ in model.model.layers)
    logits, _ = model(run, cache, at, dtype=dtype)
    return logits
