# SPDX-License-Identifier: Apache-2.0
"""Absorbed latent attention over a paged cache (DeepSeek-V2, arXiv:2405.04434, section 2.1), and its reference.

One flash kernel for decode and for chunks of prompts. A block takes 64 rows, pairs of a token and a head, of one
sequence, and a range of its cached positions. Copies of pages go to shared memory, 64 positions at a time; all rows
share them. Of two computing warpgroups each scores half of the positions (latent and rotated key: 512 + 64 columns) and
sums half of the columns. A second kernel merges the ranges.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int, UInt16

from pallas_kernels import mosaic
from pallas_kernels.heuristics import attention_splits
from pallas_kernels.mosaic import Ref

_RANK, _ROPE = 512, 64
_ROWS, _KEYS = 64, 64
_STAGES = 2
_WIDTH = _RANK + _ROPE
# Columns of shared memory that wgmma reads at a time: as many weights as a warpgroup stores, since it can store no part
# of a swizzled tile, and both operands of a product are swizzled alike.
_SWIZZLED = 32
_NONE = -1e30
"""The score of a position that a row does not see."""


def mla_attention_reference(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H P"],
    pages: BFloat16[Array, "pages page R_P"] | UInt16[Array, "pages page R_P"],
    block_table: Int[Array, "B blocks"],
    sequence: Int[Array, " T"],
    positions: Int[Array, " T"],
    scale: float,
) -> Float32[Array, "T H R"]:
    """`mla_attention` with each token's whole row of pages gathered, in float32 throughout."""
    keys = _numbers(pages)[block_table[sequence]].astype(jnp.float32)
    keys = keys.reshape(keys.shape[0], -1, _WIDTH)  # [T, S, R + P]
    seen = jnp.arange(keys.shape[1]) <= positions[:, None]
    keys = jnp.where(seen[..., None], keys, 0)
    queries = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32)
    scores = scale * jnp.einsum("thc,tsc->ths", queries, keys, precision="highest")
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _NONE), axis=-1)
    return jnp.einsum("ths,tsr->thr", weights, keys[..., :_RANK], precision="highest")


def _numbers(pages: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(pages, jnp.bfloat16) if pages.dtype == jnp.uint16 else pages


def mla_attention(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H P"],
    pages: Float[Array, "pages page R_P"] | UInt16[Array, "pages page R_P"],
    block_table: Int[Array, "B blocks"],
    sequence: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    scale: float,
    tile: int = 1,
    interpret: bool = False,
) -> BFloat16[Array, "T H R"]:
    """Attention of each token to rows 0..position of its own sequence: the weighted sums of latents.

    Products take bfloat16 operands (the weights of the sum included); scores, softmax and sums are float32, and the
    result is rounded.

    Args:
      q_latent: queries against the latent (absorbed through k_b); q_rope: rotated queries.
      pages: one layer's cache, each row the latent, then the rotated key; bfloat16 or its bits. What lies beyond a
        sequence's last position is not used, whatever it is.
      block_table: the pages of each sequence in order.
      sequence: the row of `block_table` a token belongs to. Tokens come in runs of `tile` of one sequence.
      positions: a token's position, -1 for padding (whose result is meaningless but finite).
      scale: factor of the scores before the softmax.
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for numbers that are not bfloat16, another rank, other rotary widths, and pages that
    do not divide 64 positions.
    """
    tokens, heads, rank = q_latent.shape
    page = pages.shape[1]
    if (rank, q_rope.shape[-1]) != (_RANK, _ROPE):
        raise NotImplementedError(f"the kernel takes latents of {_RANK} + {_ROPE}, not {rank} + {q_rope.shape[-1]}")
    if q_latent.dtype != jnp.bfloat16 or _numbers(pages).dtype != jnp.bfloat16:
        raise NotImplementedError(f"the kernel takes bfloat16, not queries {q_latent.dtype} and a cache {pages.dtype}")
    if page < 8 or _KEYS % page:
        raise NotImplementedError(f"the kernel takes pages of 8, 16, 32 or 64 positions, not {page}")
    if tokens % tile:
        raise ValueError(f"{tokens} tokens do not come in runs of {tile}")
    runs, run_rows = tokens // tile, tile * heads
    blocks_each = -(-run_rows // _ROWS)
    blocks = runs * blocks_each

    def in_blocks(x: jax.Array, fill: int) -> jax.Array:  # [T * H, ...] -> [blocks, 64, ...]
        x = x.reshape(runs, run_rows, *x.shape[1:])
        padding = [(0, 0), (0, blocks_each * _ROWS - run_rows)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding, constant_values=fill).reshape(blocks, _ROWS, *x.shape[2:])

    queries = in_blocks(jnp.concatenate([q_latent, q_rope], axis=-1).reshape(-1, _WIDTH), 0)
    row_positions = in_blocks(jnp.repeat(positions.astype(jnp.int32), heads), -1)
    # A tile of positions is copied by whole pages: the table is filled up to whole tiles.
    pages_a_tile = _KEYS // page
    table = jnp.pad(block_table.astype(jnp.int32), ((0, 0), (0, -block_table.shape[1] % pages_a_tile)))
    splits = attention_splits(blocks, table.shape[1] * page)
    sums, tops, totals = _ranges(
        queries,
        row_positions,
        _numbers(pages),
        table,
        jnp.repeat(sequence[::tile].astype(jnp.int32), blocks_each),
        row_positions.max(axis=1) + 1,
        scale=scale,
        splits=splits,
        interpret=interpret,
    )
    return _merged(sums, tops, totals, runs, run_rows, interpret).reshape(tokens, heads, _RANK)


def _merged(
    sums: Float32[Array, "splits blocks 64 512"],
    tops: Float32[Array, "splits blocks 2 64"],
    totals: Float32[Array, "splits blocks 2 64"],
    runs: int,
    run_rows: int,
    interpret: bool,
) -> BFloat16[Array, "rows 512"]:
    """The ranges' results as one, for the `run_rows` rows of each run; a block is a warpgroup with one row."""
    splits, blocks = sums.shape[:2]
    layout = mosaic.spread(_RANK)

    def body(sums_g: Ref, tops_g: Ref, totals_g: Ref, out_g: Ref) -> None:
        run, row = lax.axis_index("run"), lax.axis_index("row")
        block, at = run * (blocks // runs) + lax.div(row, _ROWS), lax.rem(row, _ROWS)
        ranges = range(splits)
        top = functools.reduce(jnp.maximum, [tops_g[split, block, 0, at] for split in ranges])
        shares = [jnp.exp2(tops_g[split, block, 0, at] - top) for split in ranges]
        total = sum((totals_g[s, block, 0, at] + totals_g[s, block, 1, at]) * shares[s] for s in ranges)
        out = sum(mosaic.load(sums_g.at[s, block, at], layout, interpret) * shares[s] for s in ranges)
        out_g[run * run_rows + row] = (out / jnp.where(total > 0.0, total, 1.0)).astype(jnp.bfloat16)

    return mosaic.kernel(
        body,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((runs * run_rows, _RANK), jnp.bfloat16),
        grid=(runs, run_rows),
        grid_names=("run", "row"),
        scratch_types=[],
    )(sums, tops, totals)


def _ranges(
    queries: BFloat16[Array, "blocks 64 576"],
    row_positions: Int[Array, "blocks 64"],
    pages: BFloat16[Array, "pages page 576"],
    table: Int[Array, "B blocks_of_sequence"],
    sequence: Int[Array, " blocks"],
    lengths: Int[Array, " blocks"],
    *,
    scale: float,
    splits: int,
    interpret: bool,
) -> tuple[
    Float32[Array, "splits blocks 64 512"], Float32[Array, "splits blocks 2 64"], Float32[Array, "splits blocks 2 64"]
]:
    """For each range of positions: unnormalized sums of latents, the largest score (in powers of two; twice alike), and
    the sums of weights over each warpgroup's half of the positions."""
    blocks, page = queries.shape[0], pages.shape[1]
    pages_a_tile = _KEYS // page
    half_keys, half_rank = _KEYS // 2, _RANK // 2

    def body(*refs: Ref) -> None:
        q_g, at_g, pages_g, table_g, sequence_g, lengths_g, sums_g, tops_g, totals_g, *shared = refs
        q_s, at_s, keys_s, weights_s, tops_s, q_here, keys_here, keys_done, tops_here, weights_here = shared
        split, block, wg = (lax.axis_index(name) for name in ("split", "block", "wg"))
        length = lengths_g[block]
        tiles = lax.div(length + (_KEYS - 1), _KEYS)
        each = lax.div(tiles + (splits - 1), splits)
        first = split * each
        count = jnp.maximum(jnp.minimum(first + each, tiles) - first, 0)

        def copy() -> None:
            mosaic.keep_registers(40, False, interpret)
            plgpu.copy_gmem_to_smem(q_g.at[block], q_s, q_here)
            plgpu.copy_gmem_to_smem(at_g.at[block], at_s, q_here)
            row = sequence_g[block]

            @pl.loop(0, count)
            def _(i: jax.Array) -> None:
                slot = lax.rem(i, _STAGES)
                chosen = [table_g[row, (first + i) * pages_a_tile + j] for j in range(pages_a_tile)]

                @pl.when(i >= _STAGES)
                def _() -> None:
                    plgpu.barrier_wait(keys_done.at[slot])

                for j, index in enumerate(chosen):
                    target = keys_s.at[slot, pl.ds(j * page, page)]
                    plgpu.copy_gmem_to_smem(pages_g.at[index], target, keys_here.at[slot])

            @pl.loop(jnp.maximum(count - _STAGES, 0), count)
            def _(i: jax.Array) -> None:
                plgpu.barrier_wait(keys_done.at[lax.rem(i, _STAGES)])

        def together(barrier: Ref) -> None:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        def clear_unused(slot: jax.Array, start: jax.Array) -> None:
            """Zeros in this warpgroup's columns of the positions past the end: a weight of 0 would not undo a NaN."""
            shape = (_KEYS, 64)
            used = mosaic.rows(shape, interpret) + start < length
            for j in range(half_rank // 64):
                part = keys_s.at[slot, :, pl.ds(wg * half_rank + 64 * j, 64)]
                values = mosaic.load(part, mosaic.ACCUMULATOR, interpret)
                part[...] = jnp.where(used, values, jnp.zeros_like(values))

        def compute() -> None:
            mosaic.keep_registers(232, True, interpret)
            plgpu.barrier_wait(q_here)
            half, shape = (_ROWS, half_keys), (_ROWS, half_rank)
            at = mosaic.load(at_s, mosaic.BY_ROW, interpret)

            def step(i: jax.Array, carry: tuple) -> tuple:
                out, top, total = carry
                slot, start = lax.rem(i, _STAGES), (first + i) * _KEYS
                plgpu.barrier_wait(keys_here.at[slot])
                own_keys = keys_s.at[slot, pl.ds(wg * half_keys, half_keys)]
                (scores,) = mosaic.products([(q_s, own_keys)], half_keys, interpret)
                key = mosaic.columns(half, interpret) + (start + wg * half_keys)
                scores = jnp.where(key <= mosaic.along_rows(at, half), scores * (scale * math.log2(math.e)), _NONE)
                tops_s[wg] = scores.max(axis=1)
                together(tops_here)
                tops = [mosaic.load(tops_s.at[w], mosaic.BY_ROW, interpret) for w in range(2)]
                new_top = jnp.maximum(top, jnp.maximum(*tops))
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - mosaic.along_rows(new_top, half))
                weights_s[:, pl.ds(wg * half_keys, half_keys)] = weights.astype(jnp.bfloat16)
                pl.when(start + _KEYS > length)(lambda: clear_unused(slot, start))
                plgpu.commit_smem()
                together(weights_here)
                values = keys_s.at[slot, :, pl.ds(wg * half_rank, half_rank)]
                out = mosaic.accumulated(out * mosaic.along_rows(shrink, shape), weights_s, values, interpret)
                plgpu.barrier_arrive(keys_done.at[slot])
                return out, new_top, total * shrink + weights.sum(axis=1)

            def by_row(value: float) -> jax.Array:
                return mosaic.laid_out(jnp.full((_ROWS,), value, jnp.float32), mosaic.BY_ROW, interpret)

            start = (mosaic.zeros(shape, interpret), by_row(_NONE), by_row(0.0))
            out, top, total = lax.fori_loop(0, count, step, start)
            sums_g[split, block, :, pl.ds(wg * half_rank, half_rank)] = out
            totals_g[split, block, wg] = total
            tops_g[split, block, wg] = top

        pl.when(wg == 2)(copy)
        pl.when(wg < 2)(compute)

    layout = mosaic.tiling(_SWIZZLED)
    sums, tops, totals = mosaic.kernel(
        body,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct((splits, blocks, _ROWS, _RANK), jnp.float32),
            jax.ShapeDtypeStruct((splits, blocks, 2, _ROWS), jnp.float32),
            jax.ShapeDtypeStruct((splits, blocks, 2, _ROWS), jnp.float32),
        ],
        grid=(splits, blocks),
        grid_names=("split", "block"),
        scratch_types=[
            plgpu.SMEM((_ROWS, _WIDTH), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((_ROWS,), jnp.int32),
            plgpu.SMEM((_STAGES, _KEYS, _WIDTH), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((_ROWS, _KEYS), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((2, _ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=pages_a_tile, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        warpgroups=3,
    )(queries, row_positions, pages, table, sequence, lengths)
    return sums, tops, totals
