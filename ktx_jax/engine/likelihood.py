# SPDX-License-Identifier: Apache-2.0
"""How likely given tokens are under logits, inside the compiled step."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ktx_jax import ops


def likelihood(logits: Float[Array, "L V"], target: Int[Array, " L"]) -> tuple[Float[Array, " L"], Bool[Array, " L"]]:
    """The log-probability (nats) of each row's target, and whether greedy decoding would draw it.

    Of equal logits greedy decoding draws the first, as `sampling.sample` does. A row's answer does not depend, to the
    bit, on how many rows there are.
    """
    value = jnp.take_along_axis(logits, target[:, None], axis=-1)
    best = logits.max(axis=-1, keepdims=True)
    logprob = (value - best - jnp.log(ops.sum_exp(logits, best)))[:, 0]
    before = jnp.arange(logits.shape[-1]) < target[:, None]
    return logprob, (value == best)[:, 0] & ~((logits == best) & before).any(axis=-1)
