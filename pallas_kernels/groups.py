# SPDX-License-Identifier: Apache-2.0
"""Token-expert pairs cut into tiles of rows that share an expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# Up to as many pairs, comparing each with each beats sorting them: on a GPU, a sort is a kernel for each of its passes.
_COMPARED_PAIRS = 1024


class Groups(NamedTuple):
    """Tiles of `rows` pairs of one expert each.

    Attributes:
      expert: `[tiles]` the expert of a tile; E where there is no pair left for one.
      pair: `[tiles * rows]` the pair a row holds; that of the number of pairs where it holds none.
      place: `[pairs]` the row that holds a pair; tiles * rows for ids outside 0..E-1.
    """

    expert: jax.Array
    pair: jax.Array
    place: jax.Array


def tile_count(pairs: int, experts: int, rows: int) -> int:
    """The most tiles that so many pairs can fill or begin."""
    return min(pairs, experts + pairs // rows)


def group_pairs(ids: Int[Array, " pairs"], experts: int, rows: int) -> Groups:
    """Groups pairs by expert. Ids outside 0..experts-1 (padding; other devices' experts) are left out."""
    pairs = ids.shape[0]
    tiles = tile_count(pairs, experts, rows)
    ids = jnp.where((ids >= 0) & (ids < experts), ids, experts).astype(jnp.int32)
    tile, row = (_by_comparing if pairs <= _COMPARED_PAIRS else _by_sorting)(ids, experts, rows)
    left_out = ids == experts
    place = jnp.where(left_out, tiles * rows, tile * rows + row)
    expert = jnp.full(tiles, experts, jnp.int32).at[jnp.where(left_out, tiles, tile)].set(ids, mode="drop")
    pair = jnp.full(tiles * rows, pairs, jnp.int32).at[place].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    return Groups(expert, pair, place)


def _by_comparing(ids: jax.Array, experts: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """The tile and the row in it of each pair; tiles in the order of their first pairs."""
    order = jnp.arange(ids.shape[0])
    same = ids[:, None] == ids
    rank = jnp.sum(same & (order < order[:, None]), axis=1, dtype=jnp.int32)  # of a pair among its expert's
    begins = (rank % rows == 0) & (ids < experts)
    tile_begun = jnp.sum(begins & (order < order[:, None]), axis=1, dtype=jnp.int32)
    first = rank - rank % rows
    tile = jnp.sum(jnp.where(same & (rank == first[:, None]), tile_begun, 0), axis=1, dtype=jnp.int32)
    return tile, rank % rows


def _by_sorting(ids: jax.Array, experts: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """The same with tiles in the order of their experts."""
    pairs = ids.shape[0]
    order = jnp.argsort(ids, stable=True)
    counts = jnp.bincount(ids, length=experts + 1)
    first_pair = jnp.cumsum(counts) - counts
    tiles = -(-counts // rows)
    first_tile = jnp.cumsum(tiles) - tiles
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32)) - first_pair[ids]
    return (first_tile[ids] + rank // rows).astype(jnp.int32), rank % rows
