# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the kernels: read off shapes and the H200's limits, not yet measured. Plans read them without JAX."""

from typing import NamedTuple

from pallas_kernels.formats import ROWS, TILE, Format

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM)."""

SHARED_BYTES = 232_448
"""Shared memory that one block may have on Hopper."""

THREADS = 128
"""Of a warpgroup: a row that is spread over one is a multiple of it."""

MOST_EXPERTS = 256
"""Among which the router's kernel chooses: what one copy takes."""

# Blocks of one warpgroup that should share a multiprocessor in decode, and the shared memory each then has.
_BLOCKS_EACH = 4
_BLOCK_BYTES = 56 * 1024 - 256


DECODE_ROWS = 16
"""The most rows of a tile of `decode_matmul`."""


def decode_rows(tokens: int) -> int:
    """Rows of a tile of `decode_matmul`."""
    return 8 if tokens <= 8 else DECODE_ROWS


def prefill_rows(tokens: int, weights: int) -> int:
    """Rows of a tile of `prefill_matmul`: no more than help, or than the registers hold sums of for so many weights."""
    most = 256 // weights
    return next((rows for rows in (64, 128) if tokens <= rows), most)


def group_rows(pairs: int, experts: int) -> int:
    """Rows of an expert's tile, for `pairs` pairs spread over the experts: about twice an expert's share."""
    share = pairs / experts
    if share <= 12:
        return 8 if share <= 4 else DECODE_ROWS
    return 64 if share <= 96 else 128


class DecodeTiles(NamedTuple):
    """How `decode_matmul` cuts K.

    Attributes:
      rows: of a tile, 8 or 16.
      step: columns a pipeline step reads.
      splits: ranges of K that blocks of their own sum.
      stages: steps in flight.
    """

    rows: int
    step: int
    splits: int
    stages: int


def decode_tiles(fmt: Format, rows: int, tiles: int, n: int, k: int, weights: int) -> DecodeTiles:
    """For `tiles` tiles of `rows` rows against `[n, k]` matrices, `weights` of them a block.

    K is split until four blocks share each multiprocessor, while a range has two steps at least; and not at all where
    two do so anyway, as to add up the parts takes another kernel. How it is split does not depend on `rows`,
    but on `tiles`.
    """
    step = next(s for s in (256, 192, 128, TILE) if k % s == 0 and s % fmt.depth == 0)
    steps = k // step
    wanted = _BLOCKS_EACH * MULTIPROCESSORS
    blocks = n // ROWS * tiles
    choices = [s for s in range(1, steps // 2 + 1) if steps % s == 0] or [1]
    splits = next((s for s in choices if s * blocks >= wanted), choices[-1])
    if blocks >= 2 * MULTIPROCESSORS:
        splits = 1
    stage = weights * step // fmt.depth * fmt.bytes + rows * step * 2
    beside = ROWS * rows * 4 + fmt.minima * ROWS * fmt.group * 2
    stages = max(2, min(4, (_BLOCK_BYTES - beside) // stage, steps // splits))
    return DecodeTiles(rows, step, splits, stages)


def prefill_stages(fmt: Format, rows: int, weights: int) -> int:
    """Steps of 64 columns in flight for tiles of `rows` rows: as many as shared memory holds, up to six."""
    planes = fmt.quant_rows + fmt.high_rows + min(fmt.scale_rows, 1) + fmt.factor_rows
    stage = rows * TILE * 2 + weights * 2 * planes * 256
    return min(6, (SHARED_BYTES - 2 * rows * ROWS * 2 - 2048) // stage)


def attention_splits(blocks: int, positions: int) -> int:
    """Ranges of a cache of `positions` positions: as many as give each multiprocessor a block, of 256 or more each."""
    return max(1, min(MULTIPROCESSORS // blocks, positions // 256))


def expand_stages(fmt: Format, positions: int, width: int) -> int:
    """Steps in flight of 64 latent columns of `positions` positions, and of as many rows of `width` weight columns."""
    stage = positions * TILE * 2 + width // TILE * fmt.bytes
    kept = 2 * ROWS * width * 2 * 2  # two buffers of rows, two of results
    return min(4, (SHARED_BYTES - kept - 2048) // stage)


RANGE_TILES = 8
"""Tiles of 256 positions whose keys and values are expanded at once: 134 MB for 128 heads."""

LEAST_EXPANDED = 128
"""The fewest tokens of a sequence in a step that attend in expanded form: those of one block."""
