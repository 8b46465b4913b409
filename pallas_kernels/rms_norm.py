# SPDX-License-Identifier: Apache-2.0
"""Root mean square normalization (arXiv:1910.07467), with the addition in front of it, and its reference in plain XLA.

A block is one warpgroup with one row, spread over its registers. What is normalized may be the sum of a product's parts
(`parts`): the kernel adds them up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.heuristics import THREADS
from pallas_kernels.mosaic import Ref
from pallas_kernels.parts import as_parts, row_total


def rms_norm_reference(x: BFloat16[Array, "T D"], weight: Float32[Array, " D"], eps: float) -> BFloat16[Array, "T D"]:
    """x / sqrt(mean(x²) + eps) * weight, in float32, rounded."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight).astype(x.dtype)


def add_rms_norm_reference(
    x: BFloat16[Array, "T D"], y: BFloat16[Array, "T D"], weight: Float32[Array, " D"], eps: float
) -> tuple[BFloat16[Array, "T D"], BFloat16[Array, "T D"]]:
    """x + y and its norm."""
    return x + y, rms_norm_reference(x + y, weight, eps)


def rms_norm(
    x: Float[Array, "T D"], weight: Float32[Array, " D"], eps: float, *, interpret: bool = False
) -> BFloat16[Array, "T D"]:
    """x / sqrt(mean(x²) + eps) * weight, in float32, rounded. A row's result does not depend on the others.

    Args:
      interpret: run in JAX's CPU interpreter of Mosaic kernels.

    Raises `NotImplementedError` for numbers that are not bfloat16, and rows that 128 does not divide.
    """
    [out] = _norm(x, None, weight, eps, interpret)
    return out


def add_rms_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "T D"],
    weight: Float32[Array, " D"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "T D"], BFloat16[Array, "T D"]]:
    """x + y, rounded, and its `rms_norm`."""
    total, out = _norm(y, x, weight, eps, interpret)
    return total, out


def _norm(
    x: Float[Array, "T D"],
    to: Float[Array, "T D"] | None,
    weight: Float32[Array, " D"],
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The norm of x; or where it is added `to` something, that sum and its norm."""
    tokens, size = x.shape
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rms_norm takes bfloat16 rows, not {x.dtype}")
    if size % THREADS:
        raise NotImplementedError(f"rms_norm takes rows in {THREADS}s, not of {size} values")
    parts, layout = as_parts(x), mosaic.spread(size)
    added = [] if to is None else [to]

    def body(parts_g: Ref, weight_g: Ref, *refs: Ref) -> None:
        row = lax.axis_index("row")
        value = row_total(parts_g, row, slice(0, size), interpret)
        if added:
            to_g, total_g, out_g = refs
            value = value + mosaic.load(to_g.at[row], layout, interpret).astype(jnp.float32)
            rounded = value.astype(jnp.bfloat16)
            total_g[row] = rounded
            value = rounded.astype(jnp.float32)
        else:
            [out_g] = refs
        out_g[row] = normed(value, mosaic.load(weight_g, layout, interpret), eps)

    rows = jax.ShapeDtypeStruct((tokens, size), jnp.bfloat16)
    return mosaic.kernel(
        body,
        interpret=interpret,
        out_type=[rows] * (1 + len(added)),
        grid=(tokens,),
        grid_names=("row",),
        scratch_types=[],
        reduction_scratch_bytes=16,
    )(parts, weight, *added)


def normed(row: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Inside a kernel: the norm of a row that is spread over a warpgroup, as is the weight; bfloat16."""
    mean = jnp.sum(row * row) * (1.0 / row.shape[0])
    return (row * lax.rsqrt(mean + eps) * weight).astype(jnp.bfloat16)
