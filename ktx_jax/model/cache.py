# SPDX-License-Identifier: Apache-2.0
"""The paged latent cache, and the flat run of tokens that one step adds to it."""

from dataclasses import dataclass, field
from typing import Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
import ktx_ffi
from jaxtyping import Array, Float, Int

from ktx_jax.model.config import Config
from ktx_jax.model.rope import rotate

Cache = tuple[jax.Array, ...]  # one array [pages, page, R + P] a layer


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Run:
    """A flat, ragged run of tokens: chunks of several sequences laid end to end, padded.

    Tokens come in tiles of `tile` (static) that belong to one sequence each; a decode step has tiles of 1.
    """

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]  # -1 for padding
    sequence: Int[Array, " T"]  # the row of block_table
    block_table: Int[Array, "B blocks"]  # each sequence's pages, in order
    tile: int = field(metadata={"static": True})


def new_cache(config: Config, layers: int, pages: int, page: int, dtype: jax.typing.DTypeLike) -> Cache:
    """An empty cache of `layers` layers.

    bfloat16 is kept as its bits (uint16): XLA's CPU backend would convert a bfloat16 cache to float32 and back at
    every write.
    """
    kept = jnp.uint16 if dtype == jnp.bfloat16 else dtype
    shape = (pages, page, config.latent_dim)
    return tuple(jnp.zeros(shape, kept) for _ in range(layers))


@runtime_checkable
class Norm(Protocol):
    """A norm of rows, and its weight."""

    eps: float

    @property
    def whole(self) -> jax.Array: ...

    def __call__(self, x: jax.Array) -> jax.Array: ...


def write_latents(
    pages: jax.Array,
    x: Float[Array, "T R_P"],
    norm: Norm,
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    run: Run,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Puts each token's row at its position's place: its latent's norm, then its rotated key. Padding is dropped."""
    if implementation == "pallas":  # imported when used: it takes a second
        from pallas_kernels.latents import write_latents as on_gpu

        return on_gpu(pages, x, norm.whole, norm.eps, cos, sin, _places(run, pages.shape[1], -1))
    latent, key = jnp.split(x, [x.shape[1] - 2 * cos.shape[1]], axis=-1)
    rows = jnp.concatenate([norm(latent), rotate(key, cos, sin)], axis=-1)
    return _write(pages, rows, run, implementation)


def _write(pages: jax.Array, rows: Float[Array, "T R_P"], run: Run, implementation: str) -> jax.Array:
    count, page, width = pages.shape
    if implementation == "ffi":
        return ktx_ffi.cache_write(pages, rows, _places(run, page, -1))
    place = _places(run, page, count * page)
    if pages.dtype == jnp.uint16:
        rows = jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    flat = pages.reshape(count * page, width).at[place].set(rows.astype(pages.dtype), mode="drop")
    return flat.reshape(pages.shape)


def _places(run: Run, page: int, nowhere: int) -> Int[Array, " T"]:
    """Each token's row in the pages laid end to end."""
    at = jnp.maximum(run.positions, 0)
    return jnp.where(run.positions >= 0, run.block_table[run.sequence, at // page] * page + at % page, nowhere)


def copy_pages(cache: Cache, source: Int[Array, " n"], target: Int[Array, " n"]) -> Cache:
    """The cache with the pages `target` as the pages `source` are; a target beyond the last page is dropped."""
    return tuple(pages.at[target].set(pages[source], mode="drop") for pages in cache)
