# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: a run of tokens through the model, and the draw of what comes next."""

from collections.abc import Sequence
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


class Steps:
    """The compiled steps of one model.

    The parameters go in as their flat leaves: to flatten an NNX state and hash its graph at every call would take
    milliseconds a token.

    Attributes:
      leaves: the parameters, the first argument of both steps.
      logits: `(leaves, cache, run, at)` adds the run to the cache; logits [L, V] of its tokens `at`, and the cache.
      sample: `(leaves, cache, run, at, draw, top=)` draws the token after each of `at` as well, in the same program:
        `Drawn`, and the cache. `top` (static) as in `sampling.sample`.
    """

    def __init__(self, graphdef: Any, state: Any, dtype: Any):
        self.leaves, treedef = jax.tree.flatten(state)

        def forward(
            leaves: list[jax.Array], cache: Cache, run: Run, at: Int[Array, " L"]
        ) -> tuple[Float[Array, "L V"], Cache]:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(run, cache, at, dtype=dtype)

        def draw_next(
            leaves: list[jax.Array], cache: Cache, run: Run, at: Int[Array, " L"], draw: Draw, *, top: int | None
        ) -> tuple[Drawn, Cache]:
            logits, cache = forward(leaves, cache, run, at)
            return sample(logits, draw, top=top), cache

        self.logits = jax.jit(forward, donate_argnames="cache")
        self.sample = jax.jit(draw_next, donate_argnames="cache", static_argnames="top")


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
