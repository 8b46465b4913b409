# SPDX-License-Identifier: Apache-2.0
"""MLA attention over a paged latent cache."""

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt16

from ktx_ffi._library import library


def mla_attention(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H P"],
    cache: UInt16[Array, "pages page W"] | Float32[Array, "pages page W"],
    block_tables: Int32[Array, "B max_pages"],
    sequence: Int32[Array, " T"],
    positions: Int32[Array, " T"],
    scale: float,
) -> Float[Array, "T H R"]:
    """Causal attention of each token over its own sequence's latent rows (DeepSeek-V2, section 2.1, absorbed form).

    A cache row is `[R latent | P rope]`, the bits of bfloat16 or float32. Token t of sequence `sequence[t]` attends
    rows `0..positions[t]`, row p lying in page `block_tables[sequence[t], p // page]`. Scores are
    `scale * (q_latent . latent + q_rope . rope)`; the result is the weighted sum of latents. Sequence -1 is padding
    and gives 0. Raises when run if a sequence, a position or a page it needs is out of range.
    """
    library()
    result = jax.ShapeDtypeStruct(q_latent.shape, q_latent.dtype)
    call = jax.ffi.ffi_call("ktx_mla_attention", result, vmap_method="sequential")
    operands = (q_latent, q_rope.astype(q_latent.dtype), cache, block_tables, sequence, positions)
    return call(*operands, scale=np.float32(scale))


def cache_write(
    cache: UInt16[Array, "pages page W"] | Float32[Array, "pages page W"],
    rows: Float[Array, "T W"],
    slots: Int32[Array, " T"],
) -> UInt16[Array, "pages page W"] | Float32[Array, "pages page W"]:
    """Writes row t to flat row `slots[t]` (page * page size + offset) of the cache, in place when the cache is donated.

    A uint16 cache takes the bits of bfloat16. A negative slot writes nothing; of equal slots the last row stays.
    Raises when run if a slot is beyond the cache.
    """
    library()
    result = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    call = jax.ffi.ffi_call("ktx_cache_write", result, input_output_aliases={0: 0}, vmap_method="sequential")
    return call(cache, rows, slots)
