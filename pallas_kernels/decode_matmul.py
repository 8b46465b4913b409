# SPDX-License-Identifier: Apache-2.0
"""Few rows times packed weights: streams the records once, and scales sums, not weights.

A block is one warpgroup with one 64-row slice of a weight (of two weights, for a gated pair) and one range of K. Its
pipeline copies whole records; several blocks share a multiprocessor and hide each other's latencies. For each group of
columns that share a scale, the exact quants meet the rows in one wgmma whose float32 sums are then scaled:

    out[n, m] = sum over groups g of scale[n, g] * (sum over k in g of quant[n, k] x[m, k]) - minimum[n, g] * xsum[m, g]

so weights are never rounded. Ranges of K are summed afterwards, in order.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.formats import ROWS, TILE, Format, format_of
from pallas_kernels.heuristics import DecodeTiles
from pallas_kernels.mosaic import Ref
from pallas_kernels.unpack import group_scales, scale_row, tile_values

# Float32 registers a thread spends on sums that wait for their scales.
_SUM_REGISTERS = 32


def _tile_planes(record: Ref, fmt: Format, tile: int, interpret: bool) -> list[jax.Array]:
    """The planes of quants of one tile of a record in shared memory, in registers."""
    at = [(tile * fmt.quant_rows, fmt.quant_rows)]
    if fmt.high_rows:
        at.append((fmt.high_at + tile * fmt.high_rows, fmt.high_rows))
    return [mosaic.load(record.at[pl.ds(start, n)], mosaic.plane_layout(n), interpret) for start, n in at]


def _record_scales(record: Ref, fmt: Format, tile: int, interpret: bool) -> list:
    """The scales of one tile of a record in shared memory."""
    if not fmt.scale_rows:
        return group_scales(None, None, fmt, tile, interpret)
    words = mosaic.load(record.at[fmt.scale_at + scale_row(fmt, tile)], mosaic.BY_ROW, interpret)
    factors = mosaic.load(record.at[fmt.factor_at], mosaic.BY_ROW, interpret) if fmt.factor_rows else None
    return group_scales(words, factors, fmt, tile, interpret)


def _batches(units: list, size: int) -> list[list]:
    return [units[i : i + size] for i in range(0, len(units), size)]


def decode_products(
    x: BFloat16[Array, "G R columns"],
    weights: Sequence[Int32[Array, "E n k rows 64"]],
    expert: Int32[Array, " tiles"] | None,
    name: str,
    how: DecodeTiles,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> tuple[Float[Array, "splits groups R N"], ...]:
    """x · wᵀ for each weight, as float32 parts to be summed over ranges of K; of one range, as values of `dtype`.

    Of rows of more columns than the weights have, the first K are meant.
    Each group of R rows is cut in tiles of `how.rows`. Tile i meets the matrix `expert[i]` of each weight; None for the
    matrix of its group's number. Where there is one group of one tile, it meets all of `expert`, and there is a result
    for each. Tiles whose expert is not one of the E are skipped; what is returned for them is meaningless.

    Args:
      weights: records of type `name` (`pallas_kernels.formats`), all of one shape.
      how: rows of a tile, columns a step and ranges of K (`pallas_kernels.heuristics.decode_tiles`).
    """
    fmt = format_of(name)
    groups, live, _ = x.shape
    *_, k = fmt.weight_shape(weights[0].shape)
    m = how.rows
    each = -(-live // m)  # tiles of a group
    tiles = groups * each if expert is None else expert.shape[0]
    experts, blocks = weights[0].shape[:2]
    steps = k // how.splits // how.step
    records = how.step // fmt.depth
    shape = (ROWS, m)
    dtype = dtype if how.splits == 1 else jnp.float32
    units = [(w, r, t) for r in range(records) for t in range(fmt.tiles) for w in range(len(weights))]
    a_tile = (len(weights) + fmt.minima) * fmt.groups * m // 2  # registers for sums
    at_once = max(_SUM_REGISTERS // len(weights) // a_tile, 1) * len(weights)
    # A copy fills up a tile that reaches beyond its group with zeros, and leaves out its results: few rows need not be
    # padded. More than 8 come in eights; the interpreter has no such copies.
    rows = each * m if interpret else live if live <= 8 else -(-live // 8) * 8
    if rows > live:
        x = jnp.pad(x, ((0, 0), (0, rows - live), (0, 0)))
    if x.shape[2] % TILE:
        x = x[..., :k]

    def add_scaled(totals: list, batch: list, x_s: Ref, records_s: Sequence, ones_s: Ref | None) -> None:
        pairs, summed = [], {}
        for w, r, t in batch:
            values = tile_values(_tile_planes(records_s[w].at[0, r], fmt, t, interpret), fmt, interpret)
            for g in range(fmt.groups):
                x_part = x_s.at[:, pl.ds((r * fmt.tiles + t) * TILE + g * fmt.group, fmt.group)]
                pairs.append((values[:, g * fmt.group : (g + 1) * fmt.group], x_part))
                if fmt.minima and (r, t, g) not in summed:
                    summed[r, t, g] = x_part
        # The sum of a group of x is a product with ones: it comes out where it is wanted.
        pairs += [(ones_s, x_part) for x_part in summed.values()]
        sums = iter(mosaic.products(pairs, m, interpret))
        products = [[next(sums) for _ in range(fmt.groups)] for _ in batch]
        x_sums = dict(zip(summed, sums, strict=True))
        for (w, r, t), of_unit in zip(batch, products, strict=True):
            scales = _record_scales(records_s[w].at[0, r], fmt, t, interpret)
            for g, (product, (scale, minimum)) in enumerate(zip(of_unit, scales, strict=True)):
                if scale is not None:
                    product = product * mosaic.along_rows(scale, shape)
                totals[w] = totals[w] + product
                if minimum is not None:
                    totals[w] = totals[w] - mosaic.along_rows(minimum, shape) * x_sums[r, t, g]

    def body(x_g: Ref, *refs: Ref) -> None:
        records_g, rest = refs[: len(weights)], list(refs[len(weights) :])
        expert_g = None if expert is None else rest.pop(0)
        ones_s = rest.pop() if fmt.minima else None
        outs_g, staging = rest[:-1], rest[-1]
        tile, block, split = (lax.axis_index(name) for name in ("tile", "block", "split"))
        first = split * steps
        group, part = lax.div(tile, each), lax.rem(tile, each)  # not numbers: tiles may reach out of bounds

        def step(_: Any, x_s: Ref, *buffers: Any) -> tuple[jax.Array, ...]:
            *records_s, totals = buffers
            totals = list(totals)
            for batch in _batches(units, at_once):
                add_scaled(totals, batch, x_s, records_s, ones_s)
            mosaic.warpgroup_barrier(interpret)
            return tuple(totals)

        def run(matrix: jax.Array | int) -> None:
            if ones_s is not None:
                ones_s[...] = mosaic.ones((ROWS, fmt.group), interpret)
                plgpu.commit_smem()
            spec = plgpu.BlockSpec
            in_specs = [spec((m, how.step), lambda i: (part, first + i), transforms=mosaic.tiling(fmt.group))]
            for _ in weights:
                in_specs.append(spec((1, records, fmt.rows, 64), lambda i: (block, first + i, 0, 0)))
            pipeline = plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=in_specs,
                max_concurrent_steps=how.stages,
                init_carry=tuple(mosaic.zeros(shape, interpret) for _ in weights),
            )
            totals = pipeline(x_g.at[0 if groups == 1 else group], *(r.at[matrix] for r in records_g))
            for total, out_g in zip(totals, outs_g, strict=True):
                mosaic.store_transposed(staging, total.astype(dtype), interpret)
                plgpu.commit_smem()
                place = out_g.at[split, group, pl.ds(part * m, m), pl.ds(block * ROWS, ROWS)]
                plgpu.copy_smem_to_gmem(staging, place)
                plgpu.wait_smem_to_gmem(0)

        if expert_g is None:
            run(group)
        elif experts == 1 and tiles == 1:
            run(0)
        else:
            matrix = expert_g[tile]
            pl.when((matrix >= 0) & (matrix < experts))(lambda: run(matrix))

    out_shape = (how.splits, tiles // each, rows, blocks * ROWS)
    call = mosaic.kernel(
        body,
        interpret=interpret,
        out_type=[jax.ShapeDtypeStruct(out_shape, dtype)] * len(weights),
        grid=(tiles, blocks, how.splits),
        grid_names=("tile", "block", "split"),
        scratch_types=[plgpu.SMEM((m, ROWS), dtype, transforms=mosaic.staging(dtype))]
        + [plgpu.SMEM((ROWS, fmt.group), jnp.bfloat16, transforms=mosaic.tiling(fmt.group))] * fmt.minima,
    )
    parts = call(x, *weights, *([] if expert is None else [expert]))
    return tuple(part[:, :, :live] for part in parts)
