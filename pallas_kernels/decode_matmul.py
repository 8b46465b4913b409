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
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.formats import ROWS, TILE, format_of
from pallas_kernels.heuristics import DecodeTiles
from pallas_kernels.mosaic import Ref
from pallas_kernels.unpack import record_scales, tile_planes, tile_values

# Float32 registers a thread spends on sums that wait for their scales.
_SUM_REGISTERS = 32


def _batches(units: list, size: int) -> list[list]:
    return [units[i : i + size] for i in range(0, len(units), size)]


def decode_products(
    x: BFloat16[Array, "tiles M K"],
    weights: Sequence[Int32[Array, "E n k rows 64"]],
    expert: Int32[Array, " tiles"] | None,
    name: str,
    how: DecodeTiles,
    *,
    interpret: bool = False,
) -> tuple[Float32[Array, "tiles N M"], ...]:
    """x · wᵀ for each weight, tile by tile, where tile i meets the matrix `expert[i]` of each; None for matrix i.

    Tiles whose expert is not one of the E are skipped; what is returned for them is meaningless.

    Args:
      x: tiles of M rows, 8 or 16.
      weights: records of type `name` (`pallas_kernels.formats`), all of one shape.
      how: columns a step and ranges of K (`pallas_kernels.heuristics.decode_tiles`).
    """
    fmt = format_of(name)
    tiles, m, k = x.shape
    experts, blocks = weights[0].shape[:2]
    steps = k // how.splits // how.step
    records = how.step // fmt.depth
    groups = k // fmt.group
    shape = (ROWS, m)
    out_shape = jax.ShapeDtypeStruct((how.splits, tiles, blocks, *shape), jnp.float32)
    units = [(w, r, t) for r in range(records) for t in range(fmt.tiles) for w in range(len(weights))]
    at_once = max(_SUM_REGISTERS // (len(weights) * fmt.groups * m // 2), 1)

    def add_scaled(totals: list, batch: list, x_s: Ref, sums_s: Ref | None, records_s: Sequence) -> None:
        pairs = []
        for w, r, t in batch:
            values = tile_values(tile_planes(records_s[w].at[0, r], fmt, t, interpret), fmt, interpret)
            for g in range(fmt.groups):
                column = (r * fmt.tiles + t) * TILE + g * fmt.group
                part = values[:, g * fmt.group : (g + 1) * fmt.group]
                pairs.append((part, x_s.at[:, pl.ds(column, fmt.group)]))
        sums = iter(mosaic.products(pairs, m, interpret))
        for w, r, t in batch:
            for g, (scale, minimum) in enumerate(record_scales(records_s[w].at[0, r], fmt, t, interpret)):
                product = next(sums)
                if scale is not None:
                    product = product * mosaic.along_rows(scale, shape)
                totals[w] = totals[w] + product
                if minimum is not None and sums_s is not None:
                    x_sum = mosaic.load(sums_s.at[(r * fmt.tiles + t) * fmt.groups + g], mosaic.BY_COLUMN, interpret)
                    x_sum = mosaic.along_columns(x_sum, shape, interpret)
                    totals[w] = totals[w] - mosaic.along_rows(minimum, shape) * x_sum

    def body(*refs: Ref) -> None:
        x_g, *rest = refs
        sums_g = [rest.pop(0)] if fmt.minima else []
        records_g, rest = rest[: len(weights)], rest[len(weights) :]
        expert_g = None if expert is None else rest.pop(0)
        outs_g, staging = rest[:-1], rest[-1]
        tile, block, split = (lax.axis_index(name) for name in ("tile", "block", "split"))
        first = split * steps

        def step(_: Any, x_s: Ref, *buffers: Any) -> tuple[jax.Array, ...]:
            *refs_s, totals = buffers
            totals = list(totals)
            sums_s = refs_s[0] if fmt.minima else None
            for batch in _batches(units, at_once):
                add_scaled(totals, batch, x_s, sums_s, refs_s[-len(weights) :])
            mosaic.warpgroup_barrier(interpret)
            return tuple(totals)

        def run(matrix: jax.Array | int) -> None:
            spec = plgpu.BlockSpec
            in_specs = [spec((m, how.step), lambda i: (0, first + i), transforms=mosaic.tiling(fmt.group))]
            if fmt.minima:
                in_specs.append(spec((how.step // fmt.group, m), lambda i: (first + i, 0)))
            for _ in weights:
                in_specs.append(spec((1, records, fmt.rows, 64), lambda i: (block, first + i, 0, 0)))
            pipeline = plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=in_specs,
                max_concurrent_steps=how.stages,
                init_carry=tuple(mosaic.zeros(shape, interpret) for _ in weights),
            )
            totals = pipeline(x_g.at[tile], *(s.at[tile] for s in sums_g), *(r.at[matrix] for r in records_g))
            for total, out_g in zip(totals, outs_g, strict=True):
                staging[...] = total
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging, out_g.at[split, tile, block])
                plgpu.wait_smem_to_gmem(0)

        if expert_g is None:
            run(tile)
        elif experts == 1 and tiles == 1:
            run(0)
        else:
            matrix = expert_g[tile]
            pl.when((matrix >= 0) & (matrix < experts))(lambda: run(matrix))

    operands = [x]
    if fmt.minima:
        sums = x.astype(jnp.float32).reshape(tiles, m, groups, fmt.group).sum(-1)
        operands.append(sums.transpose(0, 2, 1))
    call = mosaic.kernel(
        body,
        interpret=interpret,
        out_type=[out_shape] * len(weights),
        grid=(tiles, blocks, how.splits),
        grid_names=("tile", "block", "split"),
        scratch_types=[plgpu.SMEM(shape, jnp.float32)],
    )
    parts = call(*operands, *weights, *([] if expert is None else [expert]))
    return tuple(part.sum(0).reshape(tiles, blocks * ROWS, m) for part in parts)
