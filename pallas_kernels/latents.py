# SPDX-License-Identifier: Apache-2.0
"""What attention keeps of a token (DeepSeek-V2, arXiv:2405.04434, section 2.1.3), made and put into the paged cache.

A block is one warpgroup with one token. It writes into the cache itself: no other row is touched or copied.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int, UInt16

from pallas_kernels import mosaic
from pallas_kernels.mosaic import Ref
from pallas_kernels.parts import as_parts, row_total
from pallas_kernels.rms_norm import normed, rms_norm_reference

_RANK, _ROPE = 512, 64
_WIDTH = _RANK + _ROPE
# The rotated key alone is too few values for a warpgroup: it is taken with the columns before it, two values a thread.
_WINDOW = 256


def write_latents_reference(
    pages: UInt16[Array, "pages page R_P"],
    x: BFloat16[Array, "T R_P"],
    weight: Float32[Array, " R"],
    eps: float,
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    places: Int[Array, " T"],
) -> UInt16[Array, "pages page R_P"]:
    """`write_latents` in `jax.numpy`."""
    latent, key = rms_norm_reference(x[:, :_RANK], weight, eps), x[:, _RANK:].astype(jnp.float32)
    even, odd = key[:, 0::2], key[:, 1::2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(key.shape)
    rows = lax.bitcast_convert_type(jnp.concatenate([latent, turned.astype(x.dtype)], axis=1), jnp.uint16)
    flat = pages.reshape(-1, _WIDTH)
    return flat.at[jnp.where(places < 0, flat.shape[0], places)].set(rows, mode="drop").reshape(pages.shape)


def write_latents(
    pages: UInt16[Array, "pages page R_P"],
    x: Float[Array, "T R_P"],
    weight: Float32[Array, " R"],
    eps: float,
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    places: Int[Array, " T"],
    *,
    interpret: bool = False,
) -> UInt16[Array, "pages page R_P"]:
    """The cache with each token's row in its place: the norm of its latent, then its rotated key, as bfloat16's bits.

    Args:
      x: the product that makes both.
      weight, eps: of the norm (`pallas_kernels.rms_norm`).
      cos, sin: of the angle by which each pair of the key's values is turned.
      places: a token's row in the pages laid end to end, -1 for padding, which is not written.
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for rows that are not bfloat16, or not of 512 + 64 values.
    """
    tokens, width = x.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"write_latents takes bfloat16 rows, not {x.dtype}")
    if (weight.shape[0], width) != (_RANK, _WIDTH):
        raise NotImplementedError(f"write_latents takes rows of {_RANK} + {_ROPE}, not {width} with {weight.shape[0]}")
    page, first = pages.shape[1], _WIDTH - _WINDOW
    layout, window = mosaic.spread(_RANK), mosaic.spread(_WINDOW)

    def in_window(even: jax.Array, odd: jax.Array) -> jax.Array:  # [T, P / 2] each -> [T, window]
        pairs = jnp.stack([even, odd], axis=-1).reshape(tokens, _ROPE)
        return jnp.pad(pairs, ((0, 0), (_WINDOW - _ROPE, 0)))

    def body(pages_g: Ref, x_g: Ref, weight_g: Ref, cos_g: Ref, sin_g: Ref, places_g: Ref, turned_s: Ref) -> None:
        token = lax.axis_index("token")
        place = places_g[token]

        def write() -> None:
            row_g = pages_g.at[lax.div(place, page), lax.rem(place, page)]
            latent = row_total(x_g, token, slice(0, _RANK), interpret)
            row_g[pl.ds(0, _RANK)] = normed(latent, mosaic.load(weight_g, layout, interpret), eps)
            values = row_total(x_g, token, slice(first, _WIDTH), interpret)
            cosines, sines = (mosaic.load(ref.at[token], window, interpret) for ref in (cos_g, sin_g))
            turned = values * cosines + mosaic.pairs_swapped(values, interpret) * sines
            turned_s[...] = turned.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(turned_s.at[pl.ds(_WINDOW - _ROPE, _ROPE)], row_g.at[pl.ds(_RANK, _ROPE)])
            plgpu.wait_smem_to_gmem(0)

        pl.when(place >= 0)(write)

    cache = mosaic.mutable(lax.bitcast_convert_type(pages, jnp.bfloat16))
    mosaic.kernel(
        body,
        interpret=interpret,
        out_type=(),
        grid=(tokens,),
        grid_names=("token",),
        scratch_types=[plgpu.SMEM((_WINDOW,), jnp.bfloat16)],
        reduction_scratch_bytes=16,
    )(cache, as_parts(x), weight, in_window(cos, cos), in_window(-sin, sin), places.astype(jnp.int32))
    return lax.bitcast_convert_type(jax.freeze(cache), jnp.uint16)
