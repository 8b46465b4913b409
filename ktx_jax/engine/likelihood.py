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
    best, greedy = ops.largest(logits)
    value = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return value - best - jnp.log(ops.sum_exp(logits, best[:, None])[:, 0]), greedy == target
