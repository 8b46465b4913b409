# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: a run of tokens through the model, and the draw of what comes next."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax.engine.requests import Request
from ktx_jax.engine.sampling import Draw, Drawn, sample
from ktx_jax.engine.scheduler import Limits, Work
from ktx_jax.model.cache import Cache, Run


@partial(jax.jit, static_argnames=("graphdef", "dtype"), donate_argnames="cache")
def logits_step(
    graphdef: Any, state: Any, cache: Cache, run: Run, at: Int[Array, " L"], *, dtype: Any
) -> tuple[Float[Array, "L V"], Cache]:
    """Adds the run to the cache; logits of its tokens `at`."""
    return nnx.merge(graphdef, state)(run, cache, at, dtype=dtype)


@partial(jax.jit, static_argnames=("graphdef", "dtype", "top"), donate_argnames="cache")
def sample_step(
    graphdef: Any, state: Any, cache: Cache, run: Run, at: Int[Array, " L"], draw: Draw, *, dtype: Any, top: int
) -> tuple[Drawn, Cache]:
    """Adds the run to the cache and draws the token after each of `at`: one program a token."""
    logits, cache = nnx.merge(graphdef, state)(run, cache, at, dtype=dtype)
    return sample(logits, draw, top=top), cache


def make_run(work: Work, limits: Limits) -> tuple[Run, Int[np.ndarray, " L"]]:
    """Lays the work's tokens end to end, each share padded to the tile, all padded to a bucket of the ladder.

    Returns:
      The run, and where each share's last token lies in it, padded with 0.
    """
    tile = 1 if work.decode else limits.tile
    padded = [-(-(share.stop - share.start) // tile) * tile for share in work.shares]
    size = limits.bucket(sum(padded), decode=work.decode)
    rows = size if work.decode else limits.batch
    tokens, sequence = np.zeros(size, np.int32), np.zeros(size, np.int32)
    positions = np.full(size, -1, np.int32)
    last = np.zeros(rows, np.int32)
    table = np.zeros((rows, limits.pages_per_sequence), np.int32)
    begin = 0
    for row, (share, length) in enumerate(zip(work.shares, padded, strict=True)):
        end = begin + share.stop - share.start
        tokens[begin:end] = share.request.tokens(share.start, share.stop)
        positions[begin:end] = np.arange(share.start, share.stop)
        sequence[begin : begin + length] = row
        table[row, : len(share.request.pages)] = share.request.pages
        last[row] = end - 1
        begin += length
    return Run(*map(jnp.asarray, (tokens, positions, sequence, table)), tile=tile), last


def make_draw(requests: Sequence[Request], rows: int) -> Draw:
    """The sampling parameters of each request, padded with greedy rows."""

    def column(values: list[Any], dtype: Any, pad: Any) -> jax.Array:
        return jnp.asarray(np.asarray(values + [pad] * (rows - len(values)), dtype))

    params = [request.params for request in requests]
    return Draw(
        temperature=column([p.temperature for p in params], np.float32, 0.0),
        top_p=column([p.top_p for p in params], np.float32, 1.0),
        top_k=column([min(p.top_k, 2**31 - 1) for p in params], np.int32, 0),
        seed=column([(r.seed >> 32, r.seed & 0xFFFFFFFF) for r in requests], np.uint32, (0, 0)),
        position=column([r.length for r in requests], np.int32, 0),
    )
