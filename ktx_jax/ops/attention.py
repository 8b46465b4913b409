# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention over a paged cache (DeepSeek-V2, arXiv:2405.04434, section 2.1): absorbed, but for long
prompts on the GPU kernels."""

import jax
import jax.numpy as jnp
import ktx_ffi
from jaxtyping import Array, Float, Int, UInt16

from ktx_jax.ops.matmul import Weight, head_matmul
from ktx_jax.ops.tiles import map_tiles
from ktx_jax.quantized import PlanesArray

# Cached positions that one step of the softmax covers.
_CHUNK = 512


def latent_values(pages: jax.Array) -> jax.Array:
    """Cache rows as numbers: uint16 rows hold the bits of bfloat16."""
    return jax.lax.bitcast_convert_type(pages, jnp.bfloat16) if pages.dtype == jnp.uint16 else pages


def mla_attention(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H P"],
    pages: Float[Array, "pages page R_P"] | UInt16[Array, "pages page R_P"],
    block_table: Int[Array, "B blocks"],
    sequence: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    scale: float,
    tile: int,
    implementation: str = "xla",
) -> Float[Array, "T H R"]:
    """Attention of each token to rows 0..position of its own sequence; softmax in float32.

    Args:
      q_latent: queries against the latent (absorbed through k_b); q_rope: rotated queries.
      pages: one layer's cache, each row the latent (R) then the rotated key (P); bfloat16 bits where uint16.
      block_table: the pages of each sequence in order.
      sequence: the row of `block_table` a token belongs to. Tokens come in runs of `tile` of one sequence.
      positions: a token's position, -1 for padding (whose result is meaningless but finite).
      scale: factor of the scores before the softmax.
      implementation: "xla", "pallas" for the GPU kernel, or "ffi" for the CPU kernel, to which tiles mean nothing.

    Returns:
      The probability-weighted sum of latents for each head, to be taken through v_b.
    """
    if implementation == "ffi":
        live = jnp.where(positions >= 0, sequence, -1)
        return ktx_ffi.mla_attention(q_latent, q_rope, pages, block_table, live, positions, scale)
    if implementation == "pallas":  # imported when used: it takes a second
        from pallas_kernels.mla_attention import mla_attention as on_gpu

        out = on_gpu(q_latent, q_rope, pages, block_table, sequence, positions, scale=scale, tile=tile)
        return out.astype(q_latent.dtype)
    tokens, heads, rank = q_latent.shape
    page = pages.shape[1]
    step_blocks = max(min(_CHUNK // page, block_table.shape[1]), 1)
    steps = -(-block_table.shape[1] // step_blocks)
    table = jnp.pad(block_table, ((0, 0), (0, steps * step_blocks - block_table.shape[1])))
    queries = jnp.concatenate([q_latent, q_rope], axis=-1)

    def one_tile(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, row, position = operands  # [M, H, R+P], scalar, [M]
        blocks = table[row].reshape(steps, step_blocks)

        @jax.checkpoint
        def attend(state: tuple, start: jax.Array, chunk: jax.Array) -> tuple:
            top, total, out = state
            keys = latent_values(pages[chunk]).reshape(step_blocks * page, -1).astype(query.dtype)
            scores = scale * jnp.einsum(
                "mhc,sc->mhs", query, keys, precision="highest", preferred_element_type=jnp.float32
            )
            seen = start + jnp.arange(step_blocks * page) <= position[:, None]
            scores = jnp.where(seen[:, None, :], scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1))
            safe_top = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
            shrink = jnp.exp(top - safe_top)
            weight = jnp.exp(scores - safe_top[..., None])
            part = jnp.einsum(
                "mhs,sr->mhr", weight.astype(query.dtype), keys[:, :rank],
                precision="highest", preferred_element_type=jnp.float32,
            )  # fmt: skip
            return new_top, total * shrink + weight.sum(-1), out * shrink[..., None] + part

        def step(state: tuple, at: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            start, chunk = at
            reached = (start == 0) | (start <= position.max())
            return jax.lax.cond(reached, attend, lambda state, *_: state, state, start, chunk), None

        shape = (tile, heads)
        state = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, rank)))
        starts = jnp.arange(steps) * (step_blocks * page)
        if steps == 1:
            state = attend(state, starts[0], blocks[0])
        else:
            state, _ = jax.lax.scan(step, state, (starts, blocks))
        _, total, out = state
        return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q_latent.dtype)

    runs = (
        queries.reshape(-1, tile, heads, queries.shape[-1]),
        sequence[::tile],
        positions.reshape(-1, tile),
    )
    out = one_tile(jax.tree.map(lambda a: a[0], runs)) if tokens == tile else map_tiles(one_tile, runs, after=queries)
    return out.reshape(tokens, heads, rank)


def mla_values(
    q: Float[Array, "T H columns"],
    q_rope: Float[Array, "T H P"],
    k_b: Weight,
    v_b: Weight,
    pages: Float[Array, "pages page R_P"] | UInt16[Array, "pages page R_P"],
    block_table: Int[Array, "B blocks"],
    sequence: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    scale: float,
    tile: int,
) -> Float[Array, "T H V"]:
    """`mla_attention` from queries, whose first N columns meet k_b `[H, R, N]`, to v_b's values `[H, V, R]`, on the GPU
    kernels.

    Sequences with many tokens here attend in expanded form, the others absorbed: each by its own numbers, so that a
    row's result does not depend on the others'. Only for what `expands` takes.
    """
    assert isinstance(k_b, PlanesArray)
    assert isinstance(v_b, PlanesArray)
    from pallas_kernels.crossover import expanded_pays  # imported when used: it takes a second
    from pallas_kernels.heuristics import LEAST_EXPANDED
    from pallas_kernels.mla_prefill import mla_prefill
    from pallas_kernels.prefill_plan import prefill_plan

    rows, live = jnp.arange(block_table.shape[0]), positions >= 0
    own = (sequence[:, None] == rows) & live[:, None]  # [T, B]
    length = jnp.max(jnp.where(own, positions[:, None] + 1, 0), axis=0)
    chosen = expanded_pays(own.sum(axis=0), length)[sequence] & live
    # Like all above, it is computed once for all layers: XLA sees that it is the same, as it is outside the branches.
    many = jnp.where(chosen, positions, -1)
    plan = prefill_plan(block_table, sequence, many, page=pages.shape[1], tile=tile, least=LEAST_EXPANDED)

    def absorbed() -> jax.Array:
        q_latent, rest = head_matmul(q, k_b), jnp.where(chosen, -1, positions)
        mixed = mla_attention(
            q_latent, q_rope, pages, block_table, sequence, rest, scale=scale, tile=tile, implementation="pallas"
        )
        return head_matmul(mixed, v_b)

    def expanded(into: jax.Array) -> jax.Array:
        weights = (k_b.records, v_b.records, (k_b.ggml_type.name, v_b.ggml_type.name))
        return mla_prefill(q, q_rope, *weights, pages, plan, into, scale=scale)

    none = jnp.zeros((*q.shape[:2], v_b.shape[1]), q.dtype)
    values = jax.lax.cond(jnp.any(live & ~chosen), absorbed, lambda: none)
    return jax.lax.cond(jnp.any(chosen), expanded, lambda into: into, values)


def expands(k_b: Weight, v_b: Weight, tokens: int, page: int, tile: int) -> bool:
    """Whether a step of `tokens` may attend in expanded form: its kernels take these weights, pages and runs."""
    if not (isinstance(k_b, PlanesArray) and isinstance(v_b, PlanesArray)):
        return False
    from pallas_kernels import mla_prefill, prefill_plan
    from pallas_kernels.heuristics import LEAST_EXPANDED

    obstacles = (mla_prefill.obstacle(k_b.shape, v_b.shape), prefill_plan.obstacle(page, tile))
    return tokens >= LEAST_EXPANDED and obstacles == (None, None)
