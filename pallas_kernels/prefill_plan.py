# SPDX-License-Identifier: Apache-2.0
"""Which tokens share a block of `mla_prefill`, and which positions are expanded together: the same for every layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from pallas_kernels.groups import group_pairs
from pallas_kernels.heuristics import RANGE_TILES

ROWS = 128
"""Tokens of a block."""

KEYS = 128
"""Keys that a block takes at a time."""

POSITIONS = 256
"""Positions of a tile of what is expanded."""


class PrefillPlan(NamedTuple):
    """Blocks of tokens of one sequence, and ranges of tiles of positions, all sequences' laid end to end.

    Attributes:
      run: `[blocks, 128 / tile]` the runs of tokens that a block takes, in order; their number where there is none.
      position: `[blocks, 128]` of each token, -1 where there is none.
      span: `[ranges, blocks, 5]` what a block does in a range: the first of its rows that it reads, that row's
        position, how many keys it takes (times 128), how many of those all of its tokens see (times 128), and 1 where
        it begins plus 2 where it ends.
      page: `[ranges, tiles, pages]` the pages of a tile; live: `[ranges, tiles]` how many of its positions there are.
      matrix: `[ranges, tiles]` 0 for a tile that is expanded, -1 for one that is not.
      ranges: how many there are to go through.
    """

    run: jax.Array
    position: jax.Array
    span: jax.Array
    page: jax.Array
    live: jax.Array
    matrix: jax.Array
    ranges: jax.Array


def prefill_plan(
    block_table: Int[Array, "B blocks"],
    sequence: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    page: int,
    tile: int,
    least: int = 1,
) -> PrefillPlan:
    """The plan of a step.

    Args:
      block_table: the pages of each sequence in order, each of `page` positions.
      sequence: the row of `block_table` a token belongs to. Tokens come in runs of `tile` of one sequence.
      positions: a token's position, -1 for what is not to be attended from.
      least: the fewest tokens of a sequence that has any: it bounds the memory.

    Raises `NotImplementedError` for pages that do not divide 256 positions, and runs that do not divide 64 tokens in
    eights.
    """
    if (why := obstacle(page, tile)) is not None:
        raise NotImplementedError(why)
    if positions.shape[0] % tile:
        raise ValueError(f"{positions.shape[0]} tokens do not come in runs of {tile}")
    batch, positions = block_table.shape[0], positions.astype(jnp.int32)
    sequences = min(batch, max(positions.shape[0] // least, 1))  # that have tokens, at most
    owner, run, position = _blocks(sequence.astype(jnp.int32), positions, tile, batch, sequences)
    own = sequence[:, None] == jnp.arange(batch)
    length = jnp.max(jnp.where(own, positions[:, None], -1), axis=0) + 1
    filled = -(-length // POSITIONS)
    end = jnp.cumsum(filled)
    begin = end - filled
    pages_a_tile = POSITIONS // page
    table = jnp.pad(block_table.astype(jnp.int32), ((0, 0), (0, -block_table.shape[1] % pages_a_tile)))
    most = sequences * table.shape[1] // pages_a_tile
    tiles = min(RANGE_TILES, most)
    ranges = -(-most // tiles)
    span = _spans(owner, position, begin, end, jnp.arange(ranges, dtype=jnp.int32)[:, None] * tiles, tiles)
    at = jnp.arange(ranges * tiles, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(at[:, None] >= end, axis=1, dtype=jnp.int32), batch - 1)
    within = jnp.where(at < end[-1], at - begin[row], 0)
    index = table[row[:, None], within[:, None] * pages_a_tile + jnp.arange(pages_a_tile)]
    live = jnp.where(at < end[-1], jnp.minimum(length[row] - within * POSITIONS, POSITIONS), 0)

    def by_range(x: jax.Array) -> jax.Array:
        return x.reshape(ranges, tiles, *x.shape[1:])

    matrix = by_range(jnp.where(live > 0, 0, -1))
    return PrefillPlan(run, position, span, by_range(index), by_range(live), matrix, -(-end[-1] // tiles))


def obstacle(page: int, tile: int) -> str | None:
    """Why the kernels cannot take pages of `page` positions or runs of `tile` tokens, or None."""
    if POSITIONS % page:
        return f"the kernel takes pages that divide {POSITIONS} positions, not {page}"
    if tile % 8 or (ROWS // 2) % tile:
        return f"the kernel takes runs of 8, 16, 32 or 64 tokens, not {tile}"
    return None


def _blocks(
    sequence: jax.Array, positions: jax.Array, tile: int, batch: int, sequences: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each block the sequence (B where it is empty), the runs and the positions of its tokens."""
    runs, each = positions.shape[0] // tile, ROWS // tile
    by_run = positions.reshape(runs, tile)
    owner = jnp.where(by_run.max(axis=1) >= 0, sequence[::tile], batch)
    groups = group_pairs(owner, batch, each)
    count = min(groups.expert.shape[0], sequences + runs // each)  # blocks in use are the first
    run = groups.pair.reshape(-1, each)[:count]
    position = jnp.concatenate([by_run, jnp.full((1, tile), -1, jnp.int32)])[run].reshape(count, ROWS)
    return groups.expert[:count], run, position


def _spans(
    owner: jax.Array, position: jax.Array, begin: jax.Array, end: jax.Array, first: jax.Array, tiles: int
) -> Int32[Array, "ranges blocks 5"]:
    """`PrefillPlan.span`, for ranges of `tiles` tiles from `first` `[ranges, 1]` on."""
    owner = jnp.minimum(owner, begin.shape[0] - 1)  # an empty block's positions are -1: it has nothing to do
    low, high = (jnp.clip(x[owner] - first, 0, tiles) for x in (begin, end))
    start = (first + low - begin[owner]) * POSITIONS
    stop = start + (high - low) * POSITIONS
    last, least = position.max(axis=1), jnp.where(position < 0, 1 << 30, position).min(axis=1)
    count = jnp.maximum(-(-(jnp.minimum(last + 1, stop) - start) // KEYS), 0)
    seen = jnp.clip((least + 1 - start) // KEYS, 0, count)
    marks = jnp.where(count > 0, (start == 0) + 2 * (last < stop).astype(jnp.int32), 0)
    return jnp.stack((low * POSITIONS, start, count, seen, marks), axis=2)
