# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens from logits, inside the compiled step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from ktx_jax import ops

_WHOLE = 2.0**31  # stands for a probability of 1


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Draw:
    """Sampling parameters of each row; see `SamplingParams`. A row's draw depends on nothing but its own values."""

    temperature: Float[Array, " L"]
    top_p: Float[Array, " L"]
    top_k: Int[Array, " L"]  # 0 for all
    min_p: Float[Array, " L"]
    seed: UInt32[Array, "L 2"]
    position: Int[Array, " L"]  # of the token being drawn: makes each draw of a request its own


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Edits:
    """What is done to the logits of each row before the draw: penalties and biases of a few tokens, and a grammar.

    A positive logit is divided by `factor` and a negative one multiplied, then `add` is added; then what `allowed`
    leaves out is dropped.
    """

    tokens: Int[Array, "L edits"]  # each at most once in a row; the vocabulary's size for padding
    factor: Float[Array, "L edits"]
    add: Float[Array, "L edits"]
    allowed: UInt32[Array, "L words"]  # bit i % 32 of word i // 32


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Drawn:
    """The tokens drawn and, where asked for, log-probabilities under the unmodified logits."""

    token: Int[Array, " L"]
    logprob: Float[Array, " L"] | None = None
    top_ids: Int[Array, "L top"] | None = None
    top_logprobs: Float[Array, "L top"] | None = None


def sample(logits: Float[Array, "L V"], draw: Draw, edits: Edits | None = None, *, top: int | None) -> Drawn:
    """Draws one token a row; `top` (static): how many of the likeliest to report; None for no log-probabilities."""
    edited = logits if edits is None else _edit(logits, edits)
    token = jax.lax.cond(
        (draw.temperature > 0).any(),
        lambda: jnp.where(draw.temperature > 0, _draw(edited, draw), ops.largest(edited)[1]),
        lambda: ops.largest(edited)[1],
    )
    if top is None:
        return Drawn(token)
    logprobs = ops.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    top_logprobs, top_ids = jax.lax.top_k(logprobs, top)
    return Drawn(token, chosen, top_ids, top_logprobs)


@partial(jax.jit, static_argnames="top")
def sample_apart(logits: Float[Array, "S L V"], draw: Draw, edits: Edits | None, *, top: int | None) -> Drawn:
    """`sample` as a program of its own, for logits computed before; all arrays with a leading shard axis."""
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (logits, draw, edits))
    return jax.tree.map(lambda a: a.reshape(*logits.shape[:2], *a.shape[1:]), sample(*flat, top=top))


@partial(jax.jit, static_argnames="top")
def logprobs_of(logits: Float[Array, "S L V"], tokens: Int[Array, "S L"], *, top: int) -> Drawn:
    """Log-probabilities of given tokens, each row's, and of the `top` likeliest."""
    logprobs = ops.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    top_logprobs, top_ids = jax.lax.top_k(logprobs, top)
    return Drawn(tokens, chosen, top_ids, top_logprobs)


def _edit(logits: Float[Array, "L V"], edits: Edits) -> Float[Array, "L V"]:
    rows, size = logits.shape
    row = jnp.arange(rows)[:, None]
    values = logits.at[row, edits.tokens].get(mode="clip")
    values = jnp.where(values > 0, values / edits.factor, values * edits.factor) + edits.add
    logits = logits.at[row, edits.tokens].set(values, mode="drop")
    token = jnp.arange(size, dtype=jnp.uint32)
    allowed = edits.allowed[:, token >> 5] >> (token & 31) & 1
    return jnp.where(allowed == 1, logits, -jnp.inf)


def _draw(logits: Float[Array, "L V"], draw: Draw) -> Int[Array, " L"]:
    rows, size = logits.shape
    scaled = logits / jnp.maximum(draw.temperature, 1e-6)[:, None]
    order = _ordered_bits(scaled)
    all_tokens = jnp.zeros(rows, jnp.uint32)

    def enough(bits: UInt32[Array, " L"]) -> Bool[Array, " L"]:
        return (order >= bits[:, None]).sum(axis=-1) >= draw.top_k

    floor = jax.lax.cond((draw.top_k > 0).any(), lambda: _largest_bits(enough, rows), lambda: all_tokens)
    floor = jnp.where((draw.top_k > 0) & (draw.top_k < size), floor, all_tokens)
    # As whole numbers, whose sums do not depend on how many rows there are.
    mass = (ops.softmax(jnp.where(order >= floor[:, None], scaled, -jnp.inf)) * _WHOLE).astype(jnp.uint32)
    enough_mass = (draw.top_p * _WHOLE).astype(jnp.uint32)

    def likely(bits: UInt32[Array, " L"]) -> Bool[Array, " L"]:
        return jnp.where(order >= bits[:, None], mass, 0).sum(axis=-1, dtype=jnp.uint32) >= enough_mass

    nucleus = jax.lax.cond((draw.top_p < 1).any(), lambda: _largest_bits(likely, rows), lambda: all_tokens)
    floor = jnp.maximum(floor, jnp.where(draw.top_p < 1, nucleus, all_tokens))
    likeliest = scaled.max(axis=-1) + jnp.log(draw.min_p)
    floor = jnp.maximum(floor, _ordered_bits(likeliest))
    noisy = scaled + jax.vmap(partial(_gumbel, size=size))(draw.seed, draw.position)
    return ops.largest(jnp.where(order >= floor[:, None], noisy, -jnp.inf))[1]


def _gumbel(seed: UInt32[Array, "2"], position: Int[Array, ""], *, size: int) -> Float[Array, " V"]:
    """Noise that makes the largest a draw (the Gumbel-max trick), the request's and the position's own."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (size,))


def _ordered_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Bit patterns of float32 values that compare as the values do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_bits(holds: Callable[[jax.Array], jax.Array], rows: int) -> UInt32[Array, " L"]:
    """Each row's largest threshold at which a falling condition still holds: 32 passes in place of a sort."""

    def settle(i: jax.Array, bits: jax.Array) -> jax.Array:
        higher = bits | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, bits)

    return jax.lax.fori_loop(0, 32, settle, jnp.zeros(rows, jnp.uint32))
