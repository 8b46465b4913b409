# SPDX-License-Identifier: Apache-2.0
"""The largest value of each row, and where it is first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_WINDOW = 512


def largest(x: Float[Array, "*lead n"]) -> tuple[Float[Array, "*lead"], Int[Array, "*lead"]]:
    """The largest value along the last axis, and the first place that holds it."""
    value, place = jax.lax.platform_dependent(x.reshape(-1, x.shape[-1]), cpu=_by_windows, default=_at_once)
    return value.reshape(x.shape[:-1]), place.reshape(x.shape[:-1])


def _at_once(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x.max(axis=-1), x.argmax(axis=-1).astype(jnp.int32)


def _by_windows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By the largest of each window: on CPUs XLA's argmax goes value by value, twenty times slower than its max."""
    size = x.shape[-1]
    window = min(_WINDOW, size)
    whole = size // window * window
    tops = x[:, :whole].reshape(-1, whole // window, window).max(axis=-1)
    if whole < size:
        tops = jnp.concatenate([tops, x[:, whole:].max(axis=-1, keepdims=True)], axis=1)
    # The last window begins earlier where it would be short: what it then has of the one before is smaller.
    start = jnp.minimum(tops.argmax(axis=-1) * window, size - window)
    values = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, window))(x, start)
    return tops.max(axis=-1), (start + values.argmax(axis=-1)).astype(jnp.int32)
