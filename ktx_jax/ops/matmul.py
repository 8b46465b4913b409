# SPDX-License-Identifier: Apache-2.0
"""Products with dense or quantized weights, whose last axis is the input dimension.

How a weight lies in memory decides what computes with it: `HostArray`s go to the CPU kernels, `PlanesArray`s to the GPU
kernels (imported when first used: they take a second), all else is plain XLA.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ktx_ffi
from gguf import GGML_QUANT_SIZES
from jaxtyping import Array, Float, Int

from ktx_jax.ops.tiles import map_tiles
from ktx_jax.quantized import HostArray, PlanesArray, QuantizedArray

Weight: TypeAlias = Float[Array, "..."] | QuantizedArray | PlanesArray | HostArray

# A dequantized tile is at most this many values: it stays in the CPU's last-level cache, and the exact path's
# temporaries stay far below the model's size.
_TILE_VALUES = 1 << 20


def block_size(w: Weight) -> int:
    """Values of the input dimension that the weight's format keeps together."""
    return 1 if isinstance(w, jax.Array) else GGML_QUANT_SIZES[w.ggml_type][0]


def embedding_rows(w: Weight, ids: Int[Array, " T"], dtype: Any) -> Float[Array, "T D"]:
    """Rows `ids` of a weight `[V, D]`, dequantized."""
    if isinstance(w, HostArray):
        return ktx_ffi.embed(ids, w.handles, w.shape[1], dtype=dtype)
    if isinstance(w, PlanesArray):
        raise NotImplementedError("the GPU kernels' layout gives no single rows: an embedding must be loaded for XLA")
    return w.take(ids).dequantize(dtype) if isinstance(w, QuantizedArray) else w[ids].astype(dtype)


def _dot(x: jax.Array, w: jax.Array | QuantizedArray, *, transposed: bool = False) -> jax.Array:
    """x [T, K] · w [N, K] (or [K, N] where transposed) -> float32 [T, N].

    float32 means float32 on every platform, and sums are always float32. On CPUs bfloat16 operands are widened: in a
    loop, XLA's own bfloat16 products of few rows are ten times slower there.
    """

    def product(dtype: jax.typing.DTypeLike) -> jax.Array:
        dense = w.dequantize(dtype) if isinstance(w, QuantizedArray) else w.astype(dtype)
        equation = "tk,kn->tn" if transposed else "tk,nk->tn"
        return jnp.einsum(equation, x.astype(dtype), dense, precision="highest", preferred_element_type=jnp.float32)

    if x.dtype == jnp.float32:
        return product(jnp.float32)
    return jax.lax.platform_dependent(cpu=lambda: product(jnp.float32), default=lambda: product(x.dtype))


def _tile_rows(rows: int, row_values: int) -> int:
    """Rows in a tile: few tiles, none above the limit, a divisor of `rows` where one lies within a factor of two."""
    most = max(_TILE_VALUES // row_values, 1)
    if rows <= most:
        return rows
    tiles = -(-rows // most)
    return next((rows // n for n in range(tiles, 2 * tiles) if rows % n == 0), most)


def matmul(x: Float[Array, "T K"], w: Weight, *, dtype: Any = None) -> Float[Array, "T N"]:
    """x · wᵀ for a weight `[N, K]`. A quantized weight is dequantized a tile of rows at a time.

    Each output value is one float32 sum over K, whichever tile its row falls in, rounded to `dtype` (x's own if None).
    """
    dtype = dtype or x.dtype
    rows, k = w.shape
    if isinstance(w, HostArray):
        return ktx_ffi.matmul(x, w.handles, rows, dtype=dtype, precise=w.precise)
    if isinstance(w, PlanesArray):
        from pallas_kernels.quantized_matmul import quantized_matmul

        return quantized_matmul(x, w.records, w.ggml_type.name, dtype=dtype)
    tile = _tile_rows(rows, k)
    if not isinstance(w, QuantizedArray) or tile == rows:
        return _dot(x, w).astype(dtype)

    @jax.checkpoint  # a gradient dequantizes again: to keep every tile would be to keep the dense weight
    def one_tile(data: jax.Array) -> jax.Array:
        return _dot(x, QuantizedArray(data, w.ggml_type)).astype(dtype)

    whole = rows // tile * tile
    tiles = map_tiles(one_tile, w.data[:whole].reshape(-1, tile, *w.data.shape[1:]), after=x)
    out = jnp.moveaxis(tiles, 0, 1).reshape(x.shape[0], whole)
    if whole == rows:
        return out
    return jnp.concatenate([out, one_tile(w.data[whole:])], axis=1)


def head_matmul(x: Float[Array, "T H columns"], w: Weight, *, transposed: bool = False) -> Float[Array, "T H N"]:
    """x · wᵀ for each head, of the first K columns: w is `[H, N, K]`, or `[H, K, N]` where `transposed`."""
    if not isinstance(w, PlanesArray):
        x = x[..., : w.shape[1 if transposed else 2]]
    if isinstance(w, HostArray):
        if transposed:
            raise NotImplementedError("the CPU kernels read weights by rows: a transposed one must be loaded for XLA")
        return ktx_ffi.batched_matmul(x, w.handles, w.shape[1], precise=w.precise)
    if isinstance(w, PlanesArray):
        from pallas_kernels.quantized_matmul import batched_matmul

        if transposed:
            raise NotImplementedError("the GPU kernels read weights by rows: a transposed one must be loaded for XLA")
        return batched_matmul(x, w.records, w.ggml_type.name)

    @jax.checkpoint
    def one_head(operands: tuple[jax.Array, Weight]) -> jax.Array:
        head, weight = operands
        assert not isinstance(weight, HostArray | PlanesArray)
        return _dot(head, weight, transposed=transposed).astype(x.dtype)

    by_head = jnp.moveaxis(x, 1, 0)
    if isinstance(w, QuantizedArray):
        out = map_tiles(one_head, (by_head, w), after=x)
    else:
        out = jax.vmap(lambda head, weight: one_head((head, weight)))(by_head, w)
    return jnp.moveaxis(out, 0, 1)
