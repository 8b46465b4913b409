# SPDX-License-Identifier: Apache-2.0
"""Softmax and sums of exponentials whose every row is the same to the bit, however many rows there are.

XLA orders the additions of a sum by the whole shape, and takes one exponential or another by how it fuses and
vectorizes. Here both are spelled out; for the softmax on CPUs alone, as on GPUs that would be four kernels for one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LANES = 512
_LOWEST = -87.0  # below it float32 has no normal exp
_LOG2_E = 1.44269504
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# exp(r) = 1 + r + r² p(r) for |r| <= ln 2 / 2: the minimax polynomial of Cephes' expf, to about its last bit.
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def softmax(x: Float[Array, "*lead n"]) -> Float[Array, "*lead n"]:
    """Softmax along the last axis."""
    return jax.lax.platform_dependent(x, cpu=_softmax, default=jax.nn.softmax)


def _softmax(x: jax.Array) -> jax.Array:
    top = x.max(axis=-1, keepdims=True)
    return _exp(x - top) / sum_exp(x, top)


def log_softmax(x: Float[Array, "*lead n"]) -> Float[Array, "*lead n"]:
    """Its logarithm."""
    top = x.max(axis=-1, keepdims=True)
    return x - top - jnp.log(sum_exp(x, top))


def sum_exp(x: Float[Array, "*lead n"], top: Float[Array, "*lead 1"]) -> Float[Array, "*lead 1"]:
    """The sum of exp(x - top) along the last axis, of which `top` is the largest value: vectors of `_LANES` one after
    another, then halves to halves."""
    size = x.shape[-1]
    lanes = min(_LANES, 1 << (size - 1).bit_length())
    whole = size // lanes * lanes
    rest = _exp(x[..., whole:] - top)
    total = jnp.pad(rest, [(0, 0)] * (x.ndim - 1) + [(0, lanes - rest.shape[-1])])

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + _exp(jax.lax.dynamic_slice_in_dim(x, i * lanes, lanes, axis=-1) - top)

    if whole:
        total = jax.lax.fori_loop(0, whole // lanes, add, total)
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes:]
    return total


def _exp(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """exp(x) for x <= 0."""
    x = jnp.maximum(x, _LOWEST)
    power = jnp.round(x * _LOG2_E)
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    value = jnp.full_like(rest, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        value = value * rest + coefficient
    value = value * rest * rest + rest + 1
    return value * jax.lax.bitcast_convert_type((power.astype(jnp.int32) + 127) << 23, jnp.float32)
