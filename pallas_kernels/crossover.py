# SPDX-License-Identifier: Apache-2.0
"""Whether a sequence attends absorbed or in expanded form: by counted work, not yet measured."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.heuristics import LEAST_EXPANDED, RANGE_TILES

_OPERATIONS, _BANDWIDTH = 989e12, 4.8e12  # an H200's bfloat16 operations and bytes a second, by its data sheet
_PRODUCT = 2 * 128 * 512  # operations of a head's k_b or v_b for a token or a position


def attention_seconds(tokens: Any, positions: Any) -> tuple[Any, Any]:
    """Seconds that a head's attention takes absorbed, and expanded, by what is counted here: not measured.

    A kernel counts as the longer of its operations (two a product) and its bytes at an H200's rates; what heads share,
    latents and rotated keys, is left out.

    Args:
      tokens: of a sequence in a step, its last ones; positions: all of the sequence. Numbers or integer arrays.
    """
    tokens, positions = (jnp.asarray(x, jnp.float32) for x in (tokens, positions))
    seen = positions - tokens / 2  # on average

    def seconds(*kernels: tuple[Any, Any]) -> Any:
        return sum(jnp.maximum(operations / _OPERATIONS, size / _BANDWIDTH) for operations, size in kernels)

    absorbed = seconds(
        (_PRODUCT * tokens, (128 + 512) * 2 * tokens),  # k_b
        (2 * (576 + 512) * tokens * seen, (576 * 2 + 512 * 4) * tokens),
        (0.0, (512 * 4 + 512 * 2) * tokens),  # sums are divided and rounded
        (_PRODUCT * tokens, (512 + 128) * 2 * tokens),  # v_b
    )
    expanded_positions = jnp.ceil(positions / 256) * 256
    rows = jnp.ceil(tokens / LEAST_EXPANDED) * LEAST_EXPANDED
    kept = jnp.ceil(positions / (256 * RANGE_TILES)) - 1  # how often sums are put down and taken up again
    attend_bytes = (192 + 128) * 2 * tokens + (128 + 128) * 2 * positions + 2 * (128 + 2) * 4 * rows * kept
    expanded = seconds(
        (_PRODUCT * expanded_positions, 128 * 2 * expanded_positions),  # keys
        (_PRODUCT * expanded_positions, 128 * 2 * expanded_positions),  # values
        (2 * (192 + 128) * rows * seen, attend_bytes),
    )
    return absorbed, expanded


def expanded_pays(tokens: Any, positions: Any) -> Any:
    """Whether so many last tokens of a sequence of so many positions attend faster in expanded form."""
    absorbed, expanded = attention_seconds(tokens, positions)
    return (expanded < absorbed) & (jnp.asarray(tokens) >= LEAST_EXPANDED)
