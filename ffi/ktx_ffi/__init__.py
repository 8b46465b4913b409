# SPDX-License-Identifier: Apache-2.0
"""CPU kernels for GGUF weights, as functions of JAX arrays (see ffi/README.md)."""

from ktx_ffi._attention import cache_write, mla_attention
from ktx_ffi._library import available, isa, measure_limits, set_threads, threads, why_unavailable
from ktx_ffi._matmul import batched_matmul, embed, experts, matmul, mlp
from ktx_ffi._norm import rms_norm
from ktx_ffi._weights import SUPPORTED_TYPES, Weights

__all__ = [
    "SUPPORTED_TYPES",
    "Weights",
    "available",
    "batched_matmul",
    "cache_write",
    "embed",
    "experts",
    "isa",
    "matmul",
    "measure_limits",
    "mla_attention",
    "mlp",
    "rms_norm",
    "set_threads",
    "threads",
    "why_unavailable",
]
