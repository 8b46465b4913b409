# SPDX-License-Identifier: Apache-2.0
"""The model's heavy operations: each once, with an exact XLA form and the fast ones that must agree with it."""

from ktx_jax.ops.attention import latent_values, mla_attention
from ktx_jax.ops.experts import experts, swiglu
from ktx_jax.ops.largest import largest
from ktx_jax.ops.matmul import Weight, block_size, embedding_rows, head_matmul, matmul
from ktx_jax.ops.norm import add_rms_norm, rms_norm
from ktx_jax.ops.router import Choice, choose_experts
from ktx_jax.ops.softmax import log_softmax, softmax, sum_exp

__all__ = [
    "Choice",
    "Weight",
    "add_rms_norm",
    "block_size",
    "choose_experts",
    "embedding_rows",
    "experts",
    "head_matmul",
    "largest",
    "latent_values",
    "log_softmax",
    "matmul",
    "mla_attention",
    "rms_norm",
    "softmax",
    "sum_exp",
    "swiglu",
]
