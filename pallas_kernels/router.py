# SPDX-License-Identifier: Apache-2.0
"""The choice of each token's experts (DeepSeek-V2, arXiv:2405.04434, section 2.2.2), and its reference in plain XLA.

A block is one warpgroup with one token: its few hundred scores are spread over the threads. What is largest is found by
reducing over all of them, and where it is by reducing again, so that of equals the first is taken, as `lax.top_k` does.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.heuristics import MOST_EXPERTS, THREADS
from pallas_kernels.mosaic import Ref

_LEAST = -1e30
_COPIED = 32  # numbers of which a copy to shared memory takes multiples


def choose_experts_reference(
    logits: Float32[Array, "T E"],
    live: Bool[Array, " T"],
    *,
    experts: int,
    groups: int,
    kept_groups: int,
    normalized: bool,
    scale: float,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """`choose_experts` in `jax.lax`."""
    by_group = jax.nn.softmax(logits).reshape(logits.shape[0], groups, -1)
    _, best = lax.top_k(by_group.max(axis=-1), kept_groups)
    kept = jax.nn.one_hot(best, groups, dtype=bool).any(axis=1)
    weights, ids = lax.top_k(jnp.where(kept[..., None], by_group, 0.0).reshape(logits.shape), experts)
    if normalized:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return jnp.where(live[:, None], ids, -1), weights * scale


def choose_experts(
    logits: Float32[Array, "T E"],
    live: Bool[Array, " T"],
    *,
    experts: int,
    groups: int,
    kept_groups: int,
    normalized: bool,
    scale: float,
    interpret: bool = False,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Each token's experts, the best first, and their weights; no expert (-1) for a token that is not live.

    Scores are the softmax over all experts. Of equal scores the first is taken. A token's result does not depend on the
    others.

    Args:
      logits: the router's product.
      experts: how many a token has.
      groups, kept_groups: they come from those `kept_groups` of so many equal groups whose best experts score highest.
      normalized: whether the weights are divided by their sum, before they are multiplied by `scale`.
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for more than 256 experts.
    """
    tokens, count = logits.shape
    if count > MOST_EXPERTS:
        raise NotImplementedError(f"the kernel chooses among up to {MOST_EXPERTS} experts, not among {count}")
    if count % groups or experts > count // groups * kept_groups:
        raise ValueError(f"{count} experts in {groups} groups do not give {experts} of {kept_groups} groups")
    copied = -(-count // _COPIED) * _COPIED
    if copied > count:
        logits = jnp.pad(logits, ((0, 0), (0, copied - count)))
    lanes = -(-count // THREADS) * THREADS
    layout = mosaic.spread(lanes)

    def body(logits_g: Ref, live_g: Ref, ids_g: Ref, weights_g: Ref, row_s: Ref, here: Ref) -> None:
        token = lax.axis_index("token")
        expert = mosaic.indices(lanes, layout, interpret)
        there = expert < count
        group = expert // (count // groups)
        plgpu.copy_gmem_to_smem(logits_g.at[token], row_s.at[pl.ds(0, copied)], here)
        plgpu.barrier_wait(here)
        # What lies behind the row in shared memory is left out, whatever it is.
        row = jnp.where(there, mosaic.load(row_s, layout, interpret), _LEAST)
        powers = jnp.exp(row - jnp.max(row))
        scores = powers / jnp.sum(powers)

        def best(values: jax.Array, of: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
            """The largest value, and the first place of those `of` which it is."""
            top = jnp.max(values)
            return top, jnp.min(jnp.where(values == top, of, bound))

        if kept_groups < groups:
            left, kept = scores, jnp.zeros_like(scores)
            for _ in range(kept_groups):
                _, chosen = best(left, group, groups)
                kept = jnp.where(group == chosen, scores, kept)
                left = jnp.where(group == chosen, -1.0, left)
            scores = kept
        left, picked = jnp.where(there, scores, -1.0), []
        for _ in range(experts):
            score, chosen = best(left, expert, lanes)
            left = jnp.where(expert == chosen, -1.0, left)
            picked.append((chosen, score))
        total = sum((score for _, score in picked), jnp.float32(1e-20)) if normalized else 1.0
        for slot, (chosen, score) in enumerate(picked):
            ids_g[token, slot] = jnp.where(live_g[token] > 0, chosen, -1)
            weights_g[token, slot] = score / total * scale

    return mosaic.kernel(
        body,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct((tokens, experts), jnp.int32),
            jax.ShapeDtypeStruct((tokens, experts), jnp.float32),
        ],
        grid=(tokens,),
        grid_names=("token",),
        scratch_types=[plgpu.SMEM((lanes,), jnp.float32), plgpu.Barrier()],
        reduction_scratch_bytes=16,
    )(logits, live.astype(jnp.int32))
