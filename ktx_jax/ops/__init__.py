# SPDX-License-Identifier: Apache-2.0
"""The model's heavy operations, each with an exact XLA form."""

from ktx_jax.ops.attention import latent_values, mla_attention
from ktx_jax.ops.experts import experts, swiglu
from ktx_jax.ops.matmul import Weight, head_matmul, matmul

__all__ = ["Weight", "experts", "head_matmul", "latent_values", "matmul", "mla_attention", "swiglu"]
