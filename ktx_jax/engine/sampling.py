# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens from logits, inside the compiled step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Draw:
    """Sampling parameters of each row; see `SamplingParams`. A row's draw depends on nothing but its own values."""

    temperature: Float[Array, " L"]
    top_p: Float[Array, " L"]
    top_k: Int[Array, " L"]  # 0 for all
    seed: UInt32[Array, "L 2"]
    position: Int[Array, " L"]  # of the token being drawn: makes each draw of a request its own


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Drawn:
    """The tokens drawn, with their log-probabilities under the unmodified logits."""

    token: Int[Array, " L"]
    logprob: Float[Array, " L"]
    top_ids: Int[Array, "L top"]
    top_logprobs: Float[Array, "L top"]


def sample(logits: Float[Array, "L V"], draw: Draw, *, top: int) -> Drawn:
    """Draws one token a row; `top` (static) is how many of the most likely to report."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jax.lax.cond(
        (draw.temperature > 0).any(),
        lambda: jnp.where(draw.temperature > 0, _draw_rows(logits, draw), greedy),
        lambda: greedy,
    )
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    top_logprobs, top_ids = jax.lax.top_k(logprobs, top)
    return Drawn(token, chosen, top_ids, top_logprobs)


def _draw_rows(logits: Float[Array, "L V"], draw: Draw) -> Int[Array, " L"]:
    fields = (draw.temperature, draw.top_p, draw.top_k, draw.seed, draw.position)
    return jax.vmap(_draw_row)(logits, *fields)


def _draw_row(
    logits: Float[Array, " V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    top_k: Int[Array, ""],
    seed: UInt32[Array, "2"],
    position: Int[Array, ""],
) -> Int[Array, ""]:
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = _ordered_bits(scaled)
    size = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    kept = order >= _largest_bits(lambda bits: (order >= bits).sum() >= k)
    mass = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf))
    nucleus = _largest_bits(lambda bits: jnp.where(order >= bits, mass, 0.0).sum() >= top_p)
    kept &= (order >= nucleus) | (top_p >= 1.0)
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    noisy = scaled + jax.random.gumbel(key, logits.shape)
    return jnp.argmax(jnp.where(kept, noisy, -jnp.inf)).astype(jnp.int32)


def _ordered_bits(x: Float[Array, " V"]) -> UInt32[Array, " V"]:
    """Bit patterns of float32 values that compare as the values do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_bits(holds: Callable[[jax.Array], jax.Array]) -> UInt32[Array, ""]:
    """The largest threshold at which a falling condition still holds: 32 passes over the row in place of a sort."""

    def settle(i: jax.Array, bits: jax.Array) -> jax.Array:
        higher = bits | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, bits)

    return jax.lax.fori_loop(0, 32, settle, jnp.uint32(0))
