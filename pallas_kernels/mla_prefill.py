# SPDX-License-Identifier: Apache-2.0
"""Expanded latent attention of prompts' chunks over a paged cache (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Where a sequence has many tokens in a step, keys and values of its heads are made from the cached latents
(`mla_expand`), and attention is that of ordinary heads: 192 + 128 columns a position in place of absorbed 576 + 512.
What is expanded at once is bounded: positions of all sequences, laid end to end in tiles of 256, go through one range
of memory after another. The flash kernel takes 128 tokens of a sequence and a head a block, and keeps its sums between
ranges as they are, so a row's arithmetic depends on no neighbour and not on how ranges fall: 128 keys at a time, from
position 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int, Int32, UInt16

from pallas_kernels import mosaic
from pallas_kernels.formats import format_of
from pallas_kernels.mla_attention import mla_attention_reference
from pallas_kernels.mla_expand import HEAD, RANK, expand
from pallas_kernels.mosaic import Ref
from pallas_kernels.prefill_plan import KEYS, POSITIONS, ROWS, PrefillPlan
from pallas_kernels.unpack import dequantize

_ROPE = 64
_STAGES = 2
_NONE = -1e30
"""The score of a position that a row does not see."""


def mla_prefill_reference(
    q: BFloat16[Array, "T H columns"],
    q_rope: BFloat16[Array, "T H P"],
    k_b: Int32[Array, "H n k rows 64"],
    v_b: Int32[Array, "H m l rows2 64"],
    names: tuple[str, str],
    pages: BFloat16[Array, "pages page R_P"] | UInt16[Array, "pages page R_P"],
    block_table: Int[Array, "B blocks"],
    sequence: Int[Array, " T"],
    positions: Int[Array, " T"],
    scale: float,
) -> Float[Array, "T H V"]:
    """`mla_prefill` in its absorbed form, in float32 throughout, with the weights rounded to bfloat16."""
    dense = [dequantize(w, n).astype(jnp.bfloat16).astype(jnp.float32) for w, n in zip((k_b, v_b), names, strict=True)]
    q_latent = jnp.einsum("thn,hrn->thr", q[..., :HEAD].astype(jnp.float32), dense[0], precision="highest")
    mixed = mla_attention_reference(q_latent, q_rope, pages, block_table, sequence, positions, scale)
    return jnp.einsum("thr,hvr->thv", mixed, dense[1], precision="highest")


@jax.jit(static_argnames=("names", "scale", "interpret"))
def mla_prefill(
    q: Float[Array, "T H columns"],
    q_rope: Float[Array, "T H P"],
    k_b: Int32[Array, "H n k rows 64"],
    v_b: Int32[Array, "H m l rows2 64"],
    names: tuple[str, str],
    pages: Float[Array, "pages page R_P"] | UInt16[Array, "pages page R_P"],
    plan: PrefillPlan,
    into: Float[Array, "T H V"],
    *,
    scale: float,
    interpret: bool = False,
) -> BFloat16[Array, "T H V"]:
    """Attention of each token to rows 0..position of its own sequence: values of each head.

    Products take bfloat16 operands (the weights of the sum included); scores, softmax and sums are float32.

    Args:
      q: queries, whose first 128 columns meet keys that are made from latents; q_rope: the rotated part.
      k_b, v_b: records of the types `names`, of `[H, 512, 128]` and `[H, 128, 512]`.
      pages: one layer's cache, each row the latent, then the rotated key; bfloat16 or its bits. What lies beyond a
        sequence's last position is not used, whatever it is.
      plan: `prefill_plan` of the tokens and pages.
      into: what the result has for runs of which no token is in the plan; in others, such tokens get zeros.
      scale: factor of the scores before the softmax.
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for numbers that are not bfloat16, heads of other sizes than 128 + 64 and 128, and
    latents other than 512 + 64.
    """
    shapes = [format_of(n).weight_shape(w.shape) for n, w in zip(names, (k_b, v_b), strict=True)]
    _check(q, q_rope, shapes[0], shapes[1], pages)
    tokens, heads, _ = q.shape
    tile, blocks = ROWS // plan.run.shape[1], plan.run.shape[0]
    queries = tuple(x.reshape(tokens // tile, tile, -1) for x in (q, q_rope))
    pages = lax.bitcast_convert_type(pages, jnp.bfloat16) if pages.dtype == jnp.uint16 else pages
    out = mosaic.mutable(into.astype(jnp.bfloat16).reshape(tokens // tile, tile, heads * HEAD))
    kept = (
        mosaic.mutable(jnp.zeros((blocks, ROWS, heads * HEAD), jnp.float32)),
        mosaic.mutable(jnp.zeros((2, blocks, heads, ROWS), jnp.float32)),
    )

    def one_range(i: jax.Array, _: None) -> None:
        latents, rotated = _gathered(pages, plan.page[i], plan.live[i])
        keys, values = expand(latents, plan.matrix[i], k_b, v_b, names, interpret=interpret)
        operands = (*queries, plan.position, plan.run, plan.span[i], keys, rotated, values)
        _attend(operands, out, kept, scale=scale, interpret=interpret)

    lax.fori_loop(0, plan.ranges, one_range, None)
    return jax.freeze(out).reshape(tokens, heads, HEAD)


def obstacle(k_b: tuple[int, ...], v_b: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take weights of these shapes, or None."""
    for name, shape, want in (("k_b", k_b, (RANK, HEAD)), ("v_b", v_b, (HEAD, RANK))):
        if shape[1:] != want:
            return f"the kernel expands by a {name} of {want} a head, not {shape[1:]}"
    return None


def _check(q: jax.Array, q_rope: jax.Array, k_b: tuple[int, ...], v_b: tuple[int, ...], pages: jax.Array) -> None:
    if (why := obstacle(k_b, v_b)) is not None:
        raise NotImplementedError(why)
    if q.shape[-1] < HEAD or (q_rope.shape[-1], pages.shape[-1]) != (_ROPE, RANK + _ROPE):
        found = f"{q.shape[-1]} + {q_rope.shape[-1]} and rows of {pages.shape[-1]}"
        wanted = f"{HEAD} + {_ROPE} and rows of {RANK + _ROPE}"
        raise NotImplementedError(f"the kernel takes queries of {wanted}, not {found}")
    if q.dtype != jnp.bfloat16 or pages.dtype not in (jnp.bfloat16, jnp.uint16):
        raise NotImplementedError(f"the kernel takes bfloat16, not queries {q.dtype} and a cache {pages.dtype}")


def _gathered(
    pages: BFloat16[Array, "pages page 576"], index: Int32[Array, "tiles n"], live: Int32[Array, " tiles"]
) -> tuple[jax.Array, jax.Array]:
    """Latents `[tiles, 256, 512]` and rotated keys `[positions, 64]`, zeros beyond a tile's live positions: a weight of
    0 would not undo a NaN."""
    used = jnp.arange(POSITIONS) < live[:, None]
    rows = jnp.where(used[..., None], pages[index].reshape(*used.shape, -1), 0)
    return rows[..., :RANK], rows[..., RANK:].reshape(-1, _ROPE)


def _attend(operands: tuple, out: Ref, kept: tuple[Ref, Ref], *, scale: float, interpret: bool) -> None:
    """Adds a range of keys to the sums of every block, and puts the values of those that end into `out`.

    Args:
      operands: queries `[runs, tile, H * columns]` and `[runs, tile, H * 64]`; the plan's positions, runs, and spans of
        this range; keys `[K, H * 128]`, rotated keys `[K, 64]`, values `[K, H * 128]`.
      out: `[runs, tile, H * 128]`.
      kept: of blocks that neither begin nor end here, sums `[blocks, 128, H * 128]`, and the largest scores (in powers
        of two) and sums of weights `[2, blocks, H, 128]`.
    """
    (runs, tile, width), (blocks, each) = operands[0].shape, operands[3].shape
    heads = operands[-1].shape[1] // HEAD

    def body(*refs: Ref) -> None:
        q_g, q_rotated_g, at_g, run_g, spans_g, keys_g, rotated_g, values_g, out_g, sums_g, rows_g, *shared = refs
        q_s, q_rotated_s, at_s, keys_s, rotated_s, values_s, *barriers = shared
        q_here, keys_here, values_here, keys_done, values_done = barriers
        head, wg = lax.axis_index("head"), lax.axis_index("wg")
        block = blocks - 1 - lax.axis_index("block")  # those with most positions first
        first, start, count, seen, marks = (spans_g[block, i] for i in range(5))
        columns, rotated_columns = pl.ds(head * HEAD, HEAD), pl.ds(head * _ROPE, _ROPE)
        query = pl.ds(head * (width // heads), HEAD)

        def copy() -> None:
            mosaic.keep_registers(40, False, interpret)
            plgpu.copy_gmem_to_smem(at_g.at[block], at_s, q_here)

            @pl.loop(0, each)
            def _(j: jax.Array) -> None:
                run, rows = jnp.minimum(run_g[block, j], runs - 1), pl.ds(j * tile, tile)
                plgpu.copy_gmem_to_smem(q_g.at[run, :, query], q_s.at[rows], q_here)
                plgpu.copy_gmem_to_smem(q_rotated_g.at[run, :, rotated_columns], q_rotated_s.at[rows], q_here)

            @pl.loop(0, count)
            def _(i: jax.Array) -> None:
                slot, rows = lax.rem(i, _STAGES), pl.ds(first + i * KEYS, KEYS)
                pl.when(i >= _STAGES)(lambda: plgpu.barrier_wait(keys_done.at[slot]))
                plgpu.copy_gmem_to_smem(keys_g.at[rows, columns], keys_s.at[slot], keys_here.at[slot])
                plgpu.copy_gmem_to_smem(rotated_g.at[rows], rotated_s.at[slot], keys_here.at[slot])
                pl.when(i >= _STAGES)(lambda: plgpu.barrier_wait(values_done.at[slot]))
                plgpu.copy_gmem_to_smem(values_g.at[rows, columns], values_s.at[slot], values_here.at[slot])

            @pl.loop(jnp.maximum(count - _STAGES, 0), count)
            def _(i: jax.Array) -> None:
                slot = lax.rem(i, _STAGES)
                plgpu.barrier_wait(keys_done.at[slot])
                plgpu.barrier_wait(values_done.at[slot])

        own = pl.ds(wg * (ROWS // 2), ROWS // 2)
        square, shape = (ROWS // 2, KEYS), (ROWS // 2, HEAD)

        def compute() -> None:
            mosaic.keep_registers(232, True, interpret)
            plgpu.barrier_wait(q_here)
            at = mosaic.load(at_s.at[own], mosaic.BY_ROW, interpret)

            def step(i: jax.Array, carry: tuple, masked: bool) -> tuple:
                sums, top, total = carry
                slot = lax.rem(i, _STAGES)
                plgpu.barrier_wait(keys_here.at[slot])
                pairs = [(q_s.at[own], keys_s.at[slot]), (q_rotated_s.at[own], rotated_s.at[slot])]
                scores = mosaic.sum_of_products(pairs, KEYS, interpret)
                plgpu.barrier_arrive(keys_done.at[slot])
                scores = scores * (scale * math.log2(math.e))
                if masked:
                    key = mosaic.columns(square, interpret) + (start + i * KEYS)
                    scores = jnp.where(key <= mosaic.along_rows(at, square), scores, _NONE)
                new_top = jnp.maximum(top, scores.max(axis=1))
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - mosaic.along_rows(new_top, square))
                total = total * shrink + weights.sum(axis=1)
                sums = sums * mosaic.along_rows(shrink, shape)
                plgpu.barrier_wait(values_here.at[slot])
                sums = mosaic.accumulated(sums, weights.astype(jnp.bfloat16), values_s.at[slot], interpret)
                plgpu.barrier_arrive(values_done.at[slot])
                return sums, new_top, total

            carry = lax.cond(marks % 2 == 1, fresh, load)
            carry = lax.fori_loop(0, seen, lambda i, carry: step(i, carry, False), carry)
            sums, top, total = lax.fori_loop(seen, count, lambda i, carry: step(i, carry, True), carry)
            pl.when(marks >= 2)(lambda: finish(sums, total, at))
            pl.when(marks < 2)(lambda: keep(sums, top, total))

        def fresh() -> tuple:
            def by_row(value: float) -> jax.Array:
                return mosaic.laid_out(jnp.full((ROWS // 2,), value, jnp.float32), mosaic.BY_ROW, interpret)

            return mosaic.zeros(shape, interpret), by_row(_NONE), by_row(0.0)

        def load() -> tuple:
            sums = mosaic.load(sums_g.at[block, own, columns], mosaic.ACCUMULATOR, interpret)
            return sums, *(mosaic.load(rows_g.at[i, block, head, own], mosaic.BY_ROW, interpret) for i in range(2))

        def keep(sums: jax.Array, top: jax.Array, total: jax.Array) -> None:
            sums_g[block, own, columns] = sums
            rows_g[0, block, head, own] = top
            rows_g[1, block, head, own] = total

        def finish(sums: jax.Array, total: jax.Array, at: jax.Array) -> None:
            values = jnp.where(mosaic.along_rows(at, shape) >= 0, sums / mosaic.along_rows(total, shape), 0.0)
            mosaic.warpgroup_barrier(interpret)  # then this warpgroup's queries have been read, by all of its warps
            q_s[own] = values.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for j in range(each // 2):
                run, rows = run_g[block, wg * (each // 2) + j], pl.ds(wg * (ROWS // 2) + j * tile, tile)

                @pl.when(run < runs)
                def _(run: Any = run, rows: Any = rows) -> None:
                    plgpu.copy_smem_to_gmem(q_s.at[rows], out_g.at[run, :, columns])

            plgpu.wait_smem_to_gmem(0)

        pl.when((count > 0) & (wg == 2))(copy)
        pl.when((count > 0) & (wg < 2))(compute)

    layout = mosaic.tiling(64)
    mosaic.kernel(
        body,
        interpret=interpret,
        out_type=(),
        grid=(heads, blocks),
        grid_names=("head", "block"),
        scratch_types=[
            plgpu.SMEM((ROWS, HEAD), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((ROWS, _ROPE), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.SMEM((_STAGES, KEYS, HEAD), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((_STAGES, KEYS, _ROPE), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((_STAGES, KEYS, HEAD), jnp.bfloat16, transforms=layout),
            plgpu.Barrier(num_arrivals=2 * each + 1),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ],
        warpgroups=3,
    )(*operands, out, *kept)
