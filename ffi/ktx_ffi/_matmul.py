# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights. `dtype` is that of the result, by default that of `x`; sums are float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from ktx_ffi._library import library
from ktx_ffi._weights import Handle, operand

Offset = int | Int32[Array, "..."] | Int32[np.ndarray, "..."]


def _call(
    name: str, shape: tuple[int, ...], dtype: DTypeLike, *operands: Array | np.ndarray, **attributes: Any
) -> Array:
    library()
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ffi.ffi_call(name, result, vmap_method="sequential")(*operands, **attributes)


def matmul(
    x: Float[Array, "*b K"], w: Handle, n: int, *, dtype: DTypeLike | None = None, precise: bool = False
) -> Float[Array, "*b n"]:
    """`x @ w.T` for weights `[n, K]`: float32 or bfloat16 `x`, quantized to int8 by block where the weights are.

    `precise` also multiplies what that quantization lost: 15 bits in place of 8, for twice the arithmetic.
    Raises when run (`jax.errors.JaxRuntimeError`) if `w` is no live handle or its shape is not `[n, K]`.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = _call("ktx_matmul", (rows.shape[0], n), dtype or x.dtype, rows, operand(w), precise=precise)
    return out.reshape(*x.shape[:-1], n)


def batched_matmul(
    x: Float[Array, "T H K"], w: Handle, n: int, *, dtype: DTypeLike | None = None, precise: bool = False
) -> Float[Array, "T H n"]:
    """`einsum("thk,hnk->thn", x, w)` for weights `[H, n, K]`: MLA's absorbed projections. Otherwise as `matmul`."""
    return _call("ktx_matmul", (*x.shape[:2], n), dtype or x.dtype, x, operand(w), precise=precise)


def experts(
    x: Float[Array, "T D"],
    ids: Int32[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Handle,
    up: Handle,
    down: Handle,
    *,
    offset: Offset | None = None,
    dtype: DTypeLike | None = None,
    precise: bool = False,
) -> Float[Array, "T D"]:
    """Mixture of gated experts: the sum over k of `weights * down(silu(gate(x)) * up(x))` of expert `ids`.

    Weights are `[E, F, D]`, `[E, F, D]` and `[E, D, F]`. An id outside `[0, E)` adds nothing. The sum of a token runs
    in order of its expert ids. With an `offset` (one integer, a multiple of 16) `down` is `[E, D, K]` and the hidden
    values lie at `offset .. offset + F` of K, zeros around them: a shard of F whose cuts are not between the blocks of
    `down`. `precise` and what it raises as `matmul`.
    """
    placed = offset is not None
    at = jnp.asarray(offset if placed else 0, jnp.int32)
    operands = (x, ids, weights.astype(jnp.float32), operand(gate), operand(up), operand(down), at)
    return _call("ktx_experts", x.shape, dtype or x.dtype, *operands, placed=placed, precise=precise)


def mlp(
    x: Float[Array, "*b D"],
    gate: Handle,
    up: Handle,
    down: Handle,
    *,
    offset: Offset | None = None,
    dtype: DTypeLike | None = None,
    precise: bool = False,
) -> Float[Array, "*b D"]:
    """SwiGLU: `down(silu(gate(x)) * up(x))` with weights `[F, D]`, `[F, D]`, `[D, F]`; `offset` as in `experts`."""
    rows = x.reshape(-1, x.shape[-1])
    ids = jnp.zeros((rows.shape[0], 1), jnp.int32)
    weights = jnp.ones((rows.shape[0], 1), jnp.float32)
    return experts(rows, ids, weights, gate, up, down, offset=offset, dtype=dtype, precise=precise).reshape(x.shape)


def embed(ids: Int[Array, "*b"], w: Handle, d: int, *, dtype: DTypeLike = jnp.float32) -> Float[Array, "*b d"]:
    """Rows `ids` of weights `[V, d]` made with `repack=False`, dequantized; raises when run if an id is outside."""
    rows = _call("ktx_embed", (ids.size, d), dtype, ids.reshape(-1).astype(jnp.int32), operand(w))
    return rows.reshape(*ids.shape, d)
