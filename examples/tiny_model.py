# SPDX-License-Identifier: Apache-2.0
"""The embedded model's shape, its first values, and its forward pass over a training batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax.model.cache import Run, new_cache
from ktx_jax.model.config import Config, Yarn
from ktx_jax.model.modules import DeepseekV2ForCausalLM, MoE, Router

Params = dict[str, Any]  # module path -> array

CONFIG = Config(
    vocab_size=1920,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_topk_prob=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    yarn=Yarn(factor=4.0, original_context=1024, log_multiplier=0.0707),
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
_EMBEDDING_STD = 0.05
_BALANCE = 0.01  # weight of the load-balance loss


@jax.custom_vjp
def balanced(scores: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """The scores themselves; on the way back, the gradient of the expert balance loss joins theirs.

    That loss is E times the sum over experts of (share of tokens routed there) x (mean score), with the share held
    constant (DeepSeek-V2, arXiv:2405.04434, section 2.2.3, without the other two levels). It presumes that what is
    differentiated is the mean loss itself, unscaled.
    """
    return scores


def _balanced_forward(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    return scores, scores


def _balanced_backward(scores: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    tokens, experts = scores.shape
    _, chosen = jax.lax.top_k(scores, CONFIG.num_experts_per_tok)
    share = jax.nn.one_hot(chosen, experts).mean(axis=(0, 1))
    return (gradient + _BALANCE * experts * share / tokens,)


balanced.defvjp(_balanced_forward, _balanced_backward)


class BalancedRouter(Router):
    """The model's router, which training keeps from favouring a few experts."""

    def scores(self, logits: Float[Array, "T E"]) -> Float[Array, "T E"]:
        return balanced(super().scores(logits))


def initial_params(state: Any, seed: int) -> Params:
    """Normal values: matrices by the inverse root of their input dimension, so that signals keep their size."""
    params = {}
    for index, (key, leaf) in enumerate(nnx.to_flat_state(state)):
        path, shape = ".".join(map(str, key[:-1])), leaf.get_value().shape
        if len(shape) == 1:
            params[path] = jnp.ones(shape)
            continue
        std = _EMBEDDING_STD if path.endswith("embed_tokens") else shape[-1] ** -0.5
        if path.endswith(("o_proj", "down_proj")):
            std /= (2 * CONFIG.num_hidden_layers) ** 0.5  # what adds to the residual stream
        params[path] = std * jax.random.normal(jax.random.key(seed * 1000 + index), shape)
    return params


def abstract_model() -> tuple[Any, Any]:
    """The model's NNX graph definition, with balanced routers, and its state with shapes in place of values."""

    def build() -> DeepseekV2ForCausalLM:
        rngs = nnx.Rngs(0)
        model = DeepseekV2ForCausalLM(CONFIG, rngs=rngs)
        for layer in model.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.gate = BalancedRouter(CONFIG, rngs)
        return model

    return nnx.split(nnx.eval_shape(build))


def with_params(state: Any, params: Params) -> Any:
    """The state, holding these parameters."""
    filled = [(key, leaf.replace(params[".".join(map(str, key[:-1]))])) for key, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(filled)


def batch_loss(graphdef: Any, state: Any, rows: Int[Array, "B T1"]) -> Float[Array, ""]:
    """Mean cross entropy, nats a token, of each row's tokens after its first; the rows run flat, as in a prefill."""
    model = nnx.merge(graphdef, state)
    count, length = rows.shape[0], rows.shape[1] - 1
    run = Run(
        tokens=rows[:, :-1].reshape(-1),
        positions=jnp.tile(jnp.arange(length), count),
        sequence=jnp.repeat(jnp.arange(count), length),
        block_table=jnp.arange(count)[:, None],
        tile=length,
    )
    logits, _ = model(run, new_cache(CONFIG, count, length, jnp.float32), jnp.arange(count * length))
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:].reshape(-1)).mean()


def held_out_loss(loss: Callable[[Any, jax.Array], jax.Array], state: Any, rows: np.ndarray, size: int) -> float:
    """Mean of `loss` over rows, `size` at a time."""
    parts = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
    return float(np.mean([loss(state, jnp.asarray(part)) for part in parts]))
