# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding on consecutive pairs, with YaRN frequencies (arXiv:2104.09864, arXiv:2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ktx_jax.model.config import Config


def inverse_frequencies(config: Config) -> Float[np.ndarray, " half"]:
    """Radians a position for each of the P/2 pairs: plain and interpolated ones, as YaRN blends them."""
    dim = config.qk_rope_head_dim
    plain = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if (yarn := config.yarn) is None:
        return plain.astype(np.float32)

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        return dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return (plain * (1.0 - ramp) + plain / yarn.factor * ramp).astype(np.float32)


def cos_sin(config: Config, positions: Int[Array, " T"]) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosines and sines of every pair's angle at each position, float32."""
    angles = positions[:, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "T *heads P"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T *heads P"]:
    """Turns each consecutive pair (2i, 2i + 1) of the last axis by its angle, in float32."""
    shape = cos.shape[:1] + (1,) * (x.ndim - 2) + cos.shape[1:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
