# SPDX-License-Identifier: Apache-2.0
"""Rows times one packed weight: `quantized_matmul`, and its reference in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.decode_matmul import decode_products
from pallas_kernels.formats import format_of
from pallas_kernels.heuristics import DECODE_ROWS, decode_rows, decode_tiles, prefill_rows
from pallas_kernels.parts import total_of
from pallas_kernels.prefill_matmul import prefill_products
from pallas_kernels.unpack import dequantize


def quantized_matmul_reference(
    x: BFloat16[Array, "T K"], weight: Int32[Array, "n k rows 64"], name: str, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "T N"]:
    """x · wᵀ with the weight dequantized whole, in float32."""
    out = jnp.einsum("tk,nk->tn", x.astype(jnp.float32), dequantize(weight, name), precision="highest")
    return out.astype(dtype)


def row_tiles(x: BFloat16[Array, "T K"], rows: int) -> BFloat16[Array, "tiles rows K"]:
    """x in tiles of `rows` rows, the last filled up with zeros."""
    tokens, k = x.shape
    tiles = -(-tokens // rows)
    return jnp.pad(x, ((0, tiles * rows - tokens), (0, 0))).reshape(tiles, rows, k)


def quantized_matmul(
    x: Float[Array, "T K"],
    weight: Int32[Array, "n k rows 64"],
    name: str,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    interpret: bool = False,
) -> Float[Array, "T N"]:
    """x · wᵀ, sums in float32, rounded to `dtype`.

    Up to 16 rows, and for float32 results, weights meet the sums unrounded (`decode_matmul`); above, they are rounded
    to bfloat16 as the reference would for bfloat16 rows (`prefill_matmul`).

    Args:
      weight: records of ggml type `name` (`pallas_kernels.pack.pack`).
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for rows that are not bfloat16, a type without records, results in other types.
    """
    fmt = format_of(name)
    n, k = fmt.weight_shape(weight.shape)
    tokens = x.shape[0]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"quantized_matmul takes bfloat16 rows, not {x.dtype}")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"quantized_matmul gives bfloat16 or float32, not {jnp.dtype(dtype)}")
    if x.shape[1] != k:
        raise ValueError(f"rows of {x.shape[1]} values do not meet a weight of shape {(n, k)}")
    if tokens <= DECODE_ROWS or dtype == jnp.float32:
        rows = decode_rows(tokens)
        tiles = -(-tokens // rows)
        # As for one tile, so that no row's sum depends on how many there are.
        how = decode_tiles(fmt, rows, 1, n, k, 1)
        matrices = jnp.zeros(tiles, jnp.int32)
        (parts,) = decode_products(x[None], (weight[None],), matrices, name, how, dtype=dtype, interpret=interpret)
        if how.splits == 1 or dtype == jnp.float32:
            return parts.sum(0)[0]
        return total_of(parts[:, 0])
    tiles = row_tiles(x, prefill_rows(tokens, 1))
    matrices = jnp.zeros(tiles.shape[0], jnp.int32)
    out = prefill_products(tiles, (weight[None],), matrices, name, interpret=interpret)
    return out.reshape(-1, n)[:tokens]


def batched_matmul(
    x: BFloat16[Array, "T H columns"], weight: Int32[Array, "H n k rows 64"], name: str, *, interpret: bool = False
) -> BFloat16[Array, "T H N"]:
    """x · wᵀ for each head: `quantized_matmul` of `x[:, h]`, its first K columns, and `weight[h]`, bfloat16."""
    fmt = format_of(name)
    heads, n, k = fmt.weight_shape(weight.shape)
    tokens = x.shape[0]
    if x.shape[1] != heads or x.shape[2] < k:
        raise ValueError(f"rows {x.shape[1:]} do not meet weights of shape {(heads, n, k)}")
    by_head = x.transpose(1, 0, 2)
    if tokens <= DECODE_ROWS:
        how = decode_tiles(fmt, decode_rows(tokens), heads, n, k, 1)
        (parts,) = decode_products(by_head, (weight,), None, name, how, dtype=jnp.bfloat16, interpret=interpret)
        return parts.sum(0).astype(jnp.bfloat16).transpose(1, 0, 2)
    rows = prefill_rows(tokens, 1)
    tiles = jax.vmap(lambda head: row_tiles(head, rows))(by_head[..., :k])  # [H, tiles, rows, K]
    each = tiles.shape[1]
    matrices = jnp.repeat(jnp.arange(heads, dtype=jnp.int32), each)
    out = prefill_products(tiles.reshape(heads * each, rows, k), (weight,), matrices, name, interpret=interpret)
    return out.reshape(heads, each * rows, n)[:, :tokens].transpose(1, 0, 2)
