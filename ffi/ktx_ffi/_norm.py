# SPDX-License-Identifier: Apache-2.0
"""Normalization."""

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from ktx_ffi._library import library


def rms_norm(x: Float[Array, "*b D"], weight: Float32[Array, " D"], eps: float) -> Float[Array, "*b D"]:
    """`x / sqrt(mean(x**2) + eps) * weight` along the last axis, in float32; a row's result depends on nothing else."""
    library()
    rows = x.reshape(-1, x.shape[-1])
    result = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    out = jax.ffi.ffi_call("ktx_rms_norm", result, vmap_method="sequential")(rows, weight, eps=np.float32(eps))
    return out.reshape(x.shape)
