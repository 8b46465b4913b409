# SPDX-License-Identifier: Apache-2.0
"""Root mean square normalization (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
import ktx_ffi
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*lead D"], weight: Float[Array, " D"], eps: float, *, implementation: str = "xla"
) -> Float[Array, "*lead D"]:
    """x / sqrt(mean(x²) + eps) * weight along the last axis, in float32, rounded to x's dtype.

    On the kernels ("ffi" on CPUs, "pallas" on GPUs) a row's result does not depend, to the bit, on how many rows there
    are.
    """
    if implementation == "ffi":
        return ktx_ffi.rms_norm(x, weight, eps)
    if implementation == "pallas":
        from pallas_kernels.rms_norm import rms_norm as on_gpu

        return on_gpu(x, weight, eps)
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight).astype(x.dtype)


def add_rms_norm(
    x: Float[Array, "T D"], y: Float[Array, "T D"], weight: Float[Array, " D"], eps: float
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """x + y and its `rms_norm`, in one GPU kernel."""
    from pallas_kernels.rms_norm import add_rms_norm as on_gpu

    return on_gpu(x, y, weight, eps)
