# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 as Flax NNX modules under Hugging Face names (arXiv:2405.04434).

Letters: T tokens, D model, H heads, R latent rank, N nope, P rope, V value, E experts, F expert width, k top-k.
Each module that has a parameter has just one, `weight`; its path without `.weight` is the name rules and plans use.

On a mesh, everything here runs inside `jax.shard_map`: a weight is this device's part of it, cut as the module's `cut`
says, and activations between modules are whole. Where they are cut inside one, comments give the axes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax import ops
from ktx_jax.model.cache import Cache, Run, write_latents
from ktx_jax.model.capture import current, tracing
from ktx_jax.model.config import Config
from ktx_jax.model.linear import Embedding, HeadLinear, Linear, RMSNorm
from ktx_jax.model.rope import cos_sin, rotate
from ktx_jax.ops.parallel import Axes, add_up, first_index, offset_in_block, recut


class Attention(nnx.Module):
    """Multi-head latent attention (section 2.1), absorbed: k_b goes into the query, v_b follows the mixed latents.
    Only long prompts on the GPU kernels make keys and values of the latents (`ops.mla_values`)."""

    gives_pages = True

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
        self.k_b_proj = HeadLinear(
            c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, transposed=not c.k_b_transposed, rngs=rngs
        )
        self.v_b_proj = HeadLinear(c.num_attention_heads, c.v_head_dim, c.kv_lora_rank, rngs=rngs)
        self.o_proj = Linear(c.hidden_size, c.num_attention_heads * c.v_head_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], pages: jax.Array, run: Run, cos: jax.Array, sin: jax.Array
    ) -> tuple[Float[Array, "T D"], jax.Array]:
        c, tokens, heads = self.config, x.shape[0], self.k_b_proj.cut[0]
        with jax.named_scope("query"):
            if c.q_lora_rank is None:
                q = self.q_proj(x, want=heads)
            else:
                q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)), want=heads)
            q = q.reshape(tokens, -1, c.qk_head_dim)  # [T, H, N + P], H cut over `heads`
            q_rope = rotate(q[..., c.qk_nope_head_dim :], cos, sin)
        with jax.named_scope("latent"):
            kv, norm = self.kv_a_proj_with_mqa(x), self.kv_a_layernorm  # [T, R + P]
            pages = write_latents(pages, kv, norm, cos, sin, run, implementation=self.implementation)
        with jax.named_scope("attend"):
            values = self._values(q, q_rope, pages, run)  # [T, H, V], H cut as v_b's
        return self.o_proj(values.reshape(tokens, -1), have=self.v_b_proj.cut[0]), pages

    def _values(self, q: jax.Array, q_rope: jax.Array, pages: jax.Array, run: Run) -> jax.Array:
        """What the heads read from the cache, in the form that suits how the weights lie and are cut."""
        k_b, v_b = self.k_b_proj, self.v_b_proj
        heads, by_value = k_b.cut[0], v_b.cut[0]
        where, scale = (pages, run.block_table, run.sequence, run.positions), self.config.softmax_scale
        if self.implementation == "pallas" and heads == by_value:
            weights = k_b.weight.get_value(), v_b.weight.get_value()
            if ops.expands(*weights, q.shape[0], pages.shape[1], run.tile):
                return ops.mla_values(q, q_rope, *weights, *where, scale=scale, tile=run.tile)
        mixed = ops.mla_attention(
            k_b(q), q_rope, *where, scale=scale, tile=run.tile, implementation=self.implementation
        )
        tokens, _, rank = mixed.shape
        return v_b(recut(mixed.reshape(tokens, -1), heads, by_value).reshape(tokens, -1, rank))


class Sum(NamedTuple):
    """A value that is whole once it is summed over mesh axes."""

    value: jax.Array
    axes: Axes


def _total(*sums: Sum) -> jax.Array:
    """The sum of all, with one exchange for those over the same axes."""
    by_axes: dict[Axes, jax.Array] = {}
    for value, axes in sums:
        by_axes[axes] = by_axes[axes] + value if axes in by_axes else value
    first, *others = (add_up(value, axes) for axes, value in by_axes.items())
    return sum(others, first)


class MLP(nnx.Module):
    method = "partial"

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, size, rngs=rngs)
        self.up_proj = Linear(width, size, rngs=rngs)
        self.down_proj = Linear(size, width, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return _total(self.partial(x))

    def partial(self, x: Float[Array, "T D"]) -> Sum:
        """What this device adds. As one operation where gate and up are cut by rows, and down alike by its inputs."""
        by_row, axes = self.gate_proj.cut[0], self.down_proj.cut[1]
        if self.gate_proj.cut == self.up_proj.cut == (axes, ()) and self.down_proj.cut[0] == ():
            gate, up, down = (m.weight.get_value() for m in (self.gate_proj, self.up_proj, self.down_proj))
            offset = offset_in_block(gate.shape[0], ops.block_size(down), axes)
            return Sum(ops.swiglu(x, gate, up, down, offset=offset), axes)
        hidden = jax.nn.silu(self.gate_proj(x, want=by_row)) * self.up_proj(x, want=by_row)
        return Sum(recut(self.down_proj.partial(hidden, have=by_row), self.down_proj.cut[0], ()), axes)


class Experts(nnx.Module):
    """The routed experts' stacked weights."""

    method = "partial"

    def __init__(self, c: Config, rngs: nnx.Rngs):
        count, width, size = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_proj = Linear(count, width, size, rngs=rngs)
        self.up_proj = Linear(count, width, size, rngs=rngs)
        self.down_proj = Linear(count, size, width, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"], ids: Int[Array, "T k"], weights: Float[Array, "T k"]) -> jax.Array:
        return _total(self.partial(x, ids, weights))

    def partial(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> Sum:
        """What this device's experts, or its part of their widths, add; an id that it has not adds nothing."""
        gate, up, down = (m.weight.get_value() for m in (self.gate_proj, self.up_proj, self.down_proj))
        by_expert, _, by_width = self.down_proj.cut
        local = jnp.where(ids < 0, -1, ids - first_index(gate.shape[0], by_expert)) if by_expert else ids
        offset = offset_in_block(gate.shape[1], ops.block_size(down), by_width)
        return Sum(ops.experts(x, local, weights, gate, up, down, offset=offset), by_expert + by_width)


class Router(Linear):
    """Group-limited greedy top-k over the float32 softmax of all experts (section 2.2.2; group score: its best)."""

    method = "route"

    def __init__(self, c: Config, rngs: nnx.Rngs):
        super().__init__(c.n_routed_experts, c.hidden_size, rngs=rngs)
        self.choice = ops.Choice(
            c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor
        )
        self.implementation = "xla"

    def scores(self, logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
        return ops.softmax(logits)

    def route(self, x: Float[Array, "T D"], live: jax.Array) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        logits = self(x.astype(jnp.float32))
        return ops.choose_experts(logits, live, self.choice, scores=self.scores, implementation=self.implementation)


class MoE(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.gate = Router(c, rngs)
        self.experts: Experts | None = Experts(c, rngs)
        shared = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = MLP(c.hidden_size, shared, rngs) if shared else None

    def __call__(self, x: Float[Array, "T D"], live: jax.Array) -> Float[Array, "T D"]:
        assert self.experts is not None, "the routed experts are elsewhere"
        ids, weights = self.route(x, live)
        with jax.named_scope("experts"):
            parts = [self.experts.partial(x, ids, weights)]
            if self.shared_experts is not None:
                parts.append(self.shared_experts.partial(x))
            return _total(*parts)

    def route(self, x: Float[Array, "T D"], live: jax.Array) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """Each token's experts and their weights; no expert (-1) for a token that is not `live`."""
        with jax.named_scope("route"):
            return self.gate.route(x, live)


class DecoderLayer(nnx.Module):
    gives_pages = True

    def __init__(self, c: Config, layer: int, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c, rngs) if c.is_moe(layer) else MLP(c.hidden_size, c.intermediate_size, rngs)

    def __call__(
        self, x: Float[Array, "T D"], pages: jax.Array, run: Run, cos: jax.Array, sin: jax.Array
    ) -> tuple[Float[Array, "T D"], jax.Array]:
        x, h, pages = self._attend(x, pages, run, cos, sin)
        return x + (self.mlp(h, run.positions >= 0) if isinstance(self.mlp, MoE) else self.mlp(h)), pages

    def to_experts(
        self, x: Float[Array, "T D"], pages: jax.Array, run: Run, cos: jax.Array, sin: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
        """All that comes before the experts, routed and shared: x, their input h, and the experts' ids and weights."""
        assert isinstance(self.mlp, MoE), "a dense layer has no experts"
        x, h, pages = self._attend(x, pages, run, cos, sin)
        return (x, h, *self.mlp.route(h, run.positions >= 0)), pages

    def _attend(
        self, x: jax.Array, pages: jax.Array, run: Run, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mixed, pages = self.self_attn(self.input_layernorm(x), pages, run, cos, sin)
        x, h = self.post_attention_layernorm.of_sum(x, mixed)
        return x, h, pages


@jax.jit(static_argnums=0)
def _layer(
    graphdef: Any, state: Any, added: Mapping[str, jax.Array], *inputs: Any
) -> tuple[tuple[jax.Array, jax.Array], Mapping[str, Any]]:
    """One layer as a jitted function: layers that differ in nothing but values are traced and lowered once.

    The second result is what its tapped modules gave: nothing, as a rule.
    """
    with tracing(added) as trace:
        return nnx.merge(graphdef, state)(*inputs), trace.seen


class DeepseekV2Model(nnx.Module):
    gives_pages = True

    def __init__(self, c: Config, has: Callable[[str], bool], rngs: nnx.Rngs):
        self.config = c
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, rngs) if has("model.embed_tokens") else None
        self.layers = nnx.List(
            DecoderLayer(c, i, rngs) if has(f"model.layers.{i}") else None for i in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps) if has("model.norm") else None

    def __call__(self, run: Run, cache: Cache, x: jax.Array | None, dtype: Any) -> tuple[Float[Array, "T D"], Cache]:
        h = self._embedded(run, x, dtype)
        cos, sin = cos_sin(self.config, run.positions)
        pages, trace = [], current()
        for i, layer in enumerate(self.layers):
            if layer is not None:
                with jax.named_scope(f"layers.{i}"):
                    inputs = (h, cache[len(pages)], run, cos, sin)
                    (h, layer_pages), seen = _layer(*nnx.split(layer), trace.added, *inputs)
                pages.append(layer_pages)
                trace.seen.update(seen)
        return h, tuple(pages)

    def _embedded(self, run: Run, x: jax.Array | None, dtype: Any) -> jax.Array:
        if x is not None:
            return x
        if self.embed_tokens is None:
            raise ValueError("a part of a model without the embedding needs x")
        return self.embed_tokens.rows(run.tokens, dtype)


class DeepseekV2ForCausalLM(nnx.Module):
    """The whole model, or the part of it that one stage computes.

    Parameters are float32 arrays as made here, and `QuantizedArray`s or `HostArray`s once loaded from a file.

    Args:
      has: whether the part has a module, by its path: a layer, or what is outside the layers. None for all of them.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs, has: Callable[[str], bool] | None = None):
        has = has or (lambda path: True)
        self.config = config
        self.model = DeepseekV2Model(config, has, rngs)
        own_head = not config.tie_word_embeddings and has("lm_head")
        self.lm_head = Linear(config.vocab_size, config.hidden_size, rngs=rngs) if own_head else None

    def __call__(
        self, run: Run, cache: Cache, logits_at: Int[Array, " L"], x: jax.Array | None = None, *, dtype: Any
    ) -> tuple[jax.Array, Cache]:
        """Adds the run to the cache, which has an array for each layer that is here.

        Args:
          x: what the part before this one computed, None for the first.

        Returns:
          float32 logits [L, V] of the run's tokens `logits_at`; from a part without the head, what the next one needs.
        """
        x, cache = self.model(run, cache, x, dtype)
        return self.head(x, logits_at), cache

    @property
    def ends(self) -> bool:
        """Whether the head is here."""
        return self.head_weight is not None

    @property
    def head_weight(self) -> Linear | None:
        """What makes logits: the head, or the embedding that serves as one; None if that is in another part."""
        tied = self.config.tie_word_embeddings and self.model.norm is not None
        return self.model.embed_tokens if tied else self.lm_head

    def head(self, x: Float[Array, "T D"], at: Int[Array, " L"]) -> jax.Array:
        """The last norm and the head, as far as they are here."""
        with jax.named_scope("lm_head"):
            if self.model.norm is not None:
                x = self.model.norm(x[at])
            head = self.head_weight
            return x if head is None else head(x, dtype=jnp.float32)


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
