# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to (DeepSeek-V2, arXiv:2405.04434, section 2.2.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ktx_jax.ops.softmax import softmax


@dataclass(frozen=True)
class Choice:
    """How experts are chosen.

    Attributes:
      experts: how many of them a token has: those with the best scores.
      groups: of neighbours, that all experts form.
      kept_groups: from how many groups a token's experts may come: those whose best experts are best.
      normalized: whether the weights of a token's experts are made to sum to one.
      scale: of the weights.
    """

    experts: int
    groups: int
    kept_groups: int
    normalized: bool
    scale: float


def choose_experts(
    logits: Float[Array, "T E"],
    live: Bool[Array, " T"],
    choice: Choice,
    *,
    scores: Callable[[jax.Array], jax.Array] = softmax,
    implementation: str = "xla",
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Each token's experts, the best first, and their weights: their scores. No expert (-1) for a token not `live`.

    Args:
      scores: makes scores of logits; the GPU kernel ("pallas") has the softmax in it.
    """
    if implementation == "pallas":  # imported when used: it takes a second
        from pallas_kernels.router import choose_experts as on_gpu

        return on_gpu(
            logits, live, experts=choice.experts, groups=choice.groups, kept_groups=choice.kept_groups,
            normalized=choice.normalized, scale=choice.scale,
        )  # fmt: skip
    kept = score = scores(logits)
    tokens, experts = score.shape
    if choice.kept_groups < choice.groups:
        groups = score.reshape(tokens, choice.groups, -1)
        _, best = jax.lax.top_k(groups.max(axis=-1), choice.kept_groups)
        chosen = jax.nn.one_hot(best, choice.groups, dtype=bool).any(axis=1)
        kept = jnp.where(chosen[..., None], groups, 0.0).reshape(tokens, experts)
    weights, ids = jax.lax.top_k(kept, choice.experts)
    if choice.normalized:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return jnp.where(live[:, None], ids, -1), weights * choice.scale
