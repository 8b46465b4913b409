# SPDX-License-Identifier: Apache-2.0
"""Keys and values of each head from cached latents (DeepSeek-V2, arXiv:2405.04434, section 2.1), and their reference.

Values are a product with v_b like any other. k_b lies the other way, as absorption reads it: a head's 512 latent rows
by 128 columns, of which a key is the sum over rows. So a block, 256 positions of a head, dequantizes 64 rows at a time
in registers, to the reference's bits, and writes them to shared memory: there wgmma takes its right operand as it lies.
One warpgroup copies; two compute, each dequantizing half of the columns for both, and summing half of the positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.formats import ROWS, TILE, format_of
from pallas_kernels.heuristics import expand_stages
from pallas_kernels.mosaic import Ref
from pallas_kernels.prefill_matmul import prefill_products
from pallas_kernels.prefill_plan import POSITIONS
from pallas_kernels.unpack import dequantize, record_scales, scaled, tile_planes, tile_values

RANK, HEAD = 512, 128
"""Columns of a latent, and of a head's keys (without the rotated ones) and values."""

_COMPUTE = 2
_EACH = POSITIONS // _COMPUTE // ROWS


def expand(
    latents: BFloat16[Array, "tiles 256 512"],
    matrix: Int32[Array, " tiles"],
    k_b: Int32[Array, "H n k rows 64"],
    v_b: Int32[Array, "H m l rows2 64"],
    names: tuple[str, str],
    *,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "positions H_128"], BFloat16[Array, "positions H_128"]]:
    """Each head's keys (the part that is not rotated) and values, bfloat16 from float32 sums.

    Args:
      matrix: 0 for tiles that are expanded, -1 for others, for which what is returned is meaningless.
      k_b, v_b: records of the types `names`, of `[H, 512, 128]` and `[H, 128, 512]`.
    """
    keys = _keys(latents, matrix, k_b, names[0], interpret=interpret)
    stacked = v_b.reshape(1, -1, *v_b.shape[2:])  # the heads' rows, one after another
    values = prefill_products(latents, (stacked,), matrix, names[1], interpret=interpret)
    return keys.reshape(-1, keys.shape[2]), values.reshape(-1, values.shape[2])


def expand_reference(
    latents: BFloat16[Array, "tiles 256 512"],
    k_b: Int32[Array, "H n k rows 64"],
    v_b: Int32[Array, "H m l rows2 64"],
    names: tuple[str, str],
) -> tuple[Float32[Array, "positions H_128"], Float32[Array, "positions H_128"]]:
    """`expand` of all tiles in float32, with the weights rounded to bfloat16 as the kernels round them."""
    flat = latents.reshape(-1, RANK).astype(jnp.float32)
    both = zip(("pr,hrn->phn", "pr,hnr->phn"), (k_b, v_b), names, strict=True)
    dense = ((equation, dequantize(w, name).astype(jnp.bfloat16).astype(jnp.float32)) for equation, w, name in both)
    keys, values = (jnp.einsum(e, flat, w, precision="highest").reshape(flat.shape[0], -1) for e, w in dense)
    return keys, values


def _keys(
    latents: BFloat16[Array, "tiles 256 512"],
    matrix: Int32[Array, " tiles"],
    weight: Int32[Array, "H n k rows 64"],
    name: str,
    *,
    interpret: bool,
) -> BFloat16[Array, "tiles 256 H_128"]:
    fmt = format_of(name)
    tiles, heads = latents.shape[0], weight.shape[0]

    def body(x_g: Ref, records_g: Ref, matrix_g: Ref, out_g: Ref, weight_s: Ref, out_s: Ref, written: Ref) -> None:
        head, tile, wg = (lax.axis_index(name) for name in ("head", "tile", "wg"))

        def step(indices: tuple, x_s: Ref, records_s: Ref, sums: Any) -> Any:
            # 64 rows of k_b go into one of two buffers: whoever comes to write it is past the other's last use of it.
            slot = lax.rem(indices[0], 2)
            record = records_s.at[0, wg]
            quants = tile_values(tile_planes(record, fmt, 0, interpret), fmt, interpret)
            columns = scaled(quants, record_scales(record, fmt, 0, interpret), fmt, interpret)
            weight_s[slot, :, pl.ds(wg * TILE, TILE)] = columns
            plgpu.commit_smem()
            plgpu.barrier_arrive(written)
            plgpu.barrier_wait(written)
            first = wg * (_EACH * ROWS)
            own = [x_s.at[pl.ds(first + j * ROWS, ROWS)] for j in range(_EACH)]
            sums = tuple(
                mosaic.accumulate_onto(total, x, weight_s.at[slot], interpret)
                for total, x in zip(sums, own, strict=True)
            )
            mosaic.wgmma_wait(0, interpret)
            return sums

        def finish(*totals: jax.Array) -> None:
            for j, total in enumerate(totals):
                rows = pl.ds((wg * _EACH + j) * ROWS, ROWS)
                out_s[wg] = total.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[wg], out_g.at[tile, rows, pl.ds(head * HEAD, HEAD)])
                plgpu.wait_smem_to_gmem(0)

        def run() -> None:
            pipeline = plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(RANK // ROWS,),
                in_specs=[
                    plgpu.BlockSpec((POSITIONS, TILE), lambda i: (0, i), transforms=mosaic.tiling(TILE)),
                    plgpu.BlockSpec((1, HEAD // TILE, fmt.rows, 64), lambda i: (i, 0, 0, 0)),
                ],
                max_concurrent_steps=expand_stages(fmt, POSITIONS, HEAD),
                memory_registers=40,
                wg_axis="wg",
                num_compute_wgs=_COMPUTE,
                compute_context=lambda evaluate: mosaic.with_sums(evaluate, finish, (ROWS, HEAD), _EACH, interpret),
            )
            pipeline(x_g.at[tile], records_g.at[head])

        pl.when(matrix_g[tile] == 0)(run)

    return mosaic.kernel(
        body,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((tiles, POSITIONS, heads * HEAD), jnp.bfloat16),
        grid=(heads, tiles),
        grid_names=("head", "tile"),
        scratch_types=[
            plgpu.SMEM((2, ROWS, HEAD), jnp.bfloat16, transforms=mosaic.tiling(TILE)),
            plgpu.SMEM((_COMPUTE, ROWS, HEAD), jnp.bfloat16, transforms=mosaic.tiling(TILE)),
            plgpu.Barrier(num_arrivals=_COMPUTE),
        ],
        warpgroups=_COMPUTE + 1,
    )(latents, weight, matrix)
