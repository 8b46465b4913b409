# SPDX-License-Identifier: Apache-2.0
"""Many rows times packed weights: dequantized in registers to bfloat16, then wgmma.

A block computes 128 rows of a weight for one tile of x. One warpgroup copies; two compute, 64 weight rows each, so that
one dequantizes while the other's products run. The dequantized weights are the left operand, which wgmma takes from
registers, and are the reference's to the bit: one float32 product and difference, rounded once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels import mosaic
from pallas_kernels.formats import LEAST_ROWS, ROWS, TILE, Format, format_of
from pallas_kernels.heuristics import prefill_stages
from pallas_kernels.mosaic import Ref
from pallas_kernels.unpack import group_scales, scaled, tile_values

_COMPUTE = LEAST_ROWS // ROWS
"""Warpgroups that compute."""


def _plane_specs(fmt: Format) -> list[plgpu.BlockSpec]:
    """What step i, the 64 columns of tile i, copies of the records of a block's two slices of rows."""

    def spec(rows: int, at: int, stride: int, shared_by: int = 1) -> plgpu.BlockSpec:
        # Row `at + tile // shared_by * stride` of a record, in units of `rows`.
        def index(i: jax.Array) -> tuple:
            tile = lax.div(lax.rem(i, fmt.tiles), shared_by)
            return 0, lax.div(i, fmt.tiles), at // rows + tile * (stride // rows), 0

        return plgpu.BlockSpec((_COMPUTE, 1, rows, 64), index)

    specs = [spec(fmt.quant_rows, 0, fmt.quant_rows)]
    if fmt.high_rows:
        specs.append(spec(fmt.high_rows, fmt.high_at, fmt.high_rows))
    if fmt.scale_rows:
        specs.append(spec(1, fmt.scale_at, 1, fmt.tiles // fmt.scale_rows))
    if fmt.factor_rows:
        specs.append(spec(1, fmt.factor_at, 0))
    return specs


def _dequantized(planes: Sequence[Ref], fmt: Format, wg: jax.Array, tile: jax.Array, interpret: bool) -> jax.Array:
    """This warpgroup's tile of the weight, `[64, 64]` bfloat16, from the planes in shared memory."""
    *quants, last = planes if fmt.factor_rows else (*planes, None)
    words = quants.pop() if fmt.scale_rows else None
    values = tile_values(
        [mosaic.load(q.at[wg, 0], mosaic.plane_layout(q.shape[2]), interpret) for q in quants], fmt, interpret
    )
    if words is None:
        return values
    word = mosaic.load(words.at[wg, 0, 0], mosaic.BY_ROW, interpret)
    factors = None if last is None else mosaic.load(last.at[wg, 0, 0], mosaic.BY_ROW, interpret)
    return scaled(values, group_scales(word, factors, fmt, tile, interpret), fmt, interpret)


def prefill_products(
    x: BFloat16[Array, "tiles M K"],
    weights: Sequence[Int32[Array, "E n k rows 64"]],
    expert: Int32[Array, " tiles"],
    name: str,
    *,
    interpret: bool = False,
) -> BFloat16[Array, "tiles M N"]:
    """x · wᵀ, or of two weights silu(x · w0ᵀ) * (x · w1ᵀ), where tile i meets the matrix `expert[i]` of each.

    Tiles whose expert is not one of the E are skipped; what is returned for them is meaningless.

    Args:
      x: tiles of M rows: 64, 128 or (for one weight) 256.
      weights: one or two arrays of records of type `name` (`pallas_kernels.formats`), of one shape.
    """
    fmt = format_of(name)
    tiles, m, k = x.shape
    experts, slices = weights[0].shape[:2]
    if slices * ROWS < LEAST_ROWS:
        raise NotImplementedError(f"the prefill kernel takes weights of {LEAST_ROWS} rows and more: N is {ROWS}")
    specs = _plane_specs(fmt)
    steps = k // TILE

    def body(x_g: Ref, *refs: Ref) -> None:
        records_g, (expert_g, out_g, out_s) = refs[: len(weights)], refs[len(weights) :]
        block, tile, wg = (lax.axis_index(name) for name in ("block", "tile", "wg"))
        # With an odd number of slices the last two blocks share one, and write it twice alike.
        first = jnp.minimum(block * _COMPUTE, slices - _COMPUTE)

        def step(indices: tuple, x_s: Ref, *operands: Any) -> Any:
            *planes, carried = operands
            at = lax.rem(indices[0], fmt.tiles)
            sums = list(carried)
            for w in range(len(weights)):
                own = planes[w * len(specs) : (w + 1) * len(specs)]
                values = _dequantized(own, fmt, wg, at, interpret)
                sums[w] = mosaic.accumulate(sums[w], values, x_s, interpret)
            mosaic.wgmma_wait(0, interpret)
            return tuple(sums)

        def finish(*totals: jax.Array) -> None:
            total = totals[0]
            if len(totals) == 2:
                total = total / (1.0 + jnp.exp(-total)) * totals[1]
            mosaic.store_transposed(out_s.at[wg], total.astype(jnp.bfloat16), interpret)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[wg], out_g.at[tile, :, pl.ds((first + wg) * ROWS, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        def run(matrix: jax.Array | int) -> None:
            pipeline = plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(steps,),
                in_specs=[plgpu.BlockSpec((m, TILE), lambda i: (0, i), transforms=mosaic.tiling(TILE))]
                + specs * len(weights),
                max_concurrent_steps=prefill_stages(fmt, m, len(weights)),
                memory_registers=40,
                wg_axis="wg",
                num_compute_wgs=_COMPUTE,
                compute_context=lambda evaluate: mosaic.with_sums(evaluate, finish, (ROWS, m), len(weights), interpret),
            )
            pipeline(
                x_g.at[tile],
                *(r.at[matrix, pl.ds(first, _COMPUTE)] for r in records_g for _ in specs),
            )

        if experts == 1 and tiles == 1:
            run(0)
        else:
            matrix = expert_g[tile]
            pl.when((matrix >= 0) & (matrix < experts))(lambda: run(matrix))

    return mosaic.kernel(
        body,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((tiles, m, slices * ROWS), jnp.bfloat16),
        grid=(-(-slices // _COMPUTE), tiles),
        grid_names=("block", "tile"),
        scratch_types=[plgpu.SMEM((_COMPUTE, m, ROWS), jnp.bfloat16, transforms=mosaic.tiling(ROWS))],
        warpgroups=_COMPUTE + 1,
    )(x, *weights, expert)
