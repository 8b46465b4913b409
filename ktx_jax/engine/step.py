# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: a run of tokens through the model, and the draw of what comes next."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ktx_jax.engine.requests import Request
from ktx_jax.engine.sampling import Draw, Drawn, sample
from ktx_jax.engine.scheduler import Limits, Work
from ktx_jax.model.cache import Cache, Run, new_cache
from ktx_jax.model.config import Config
from ktx_jax.sharding.load import Loaded


class Steps:
    """The compiled steps of one model, with its parameters and its cache.

    Inputs are NumPy arrays, with a leading axis for the shards of the `data` axis; results are arrays on the device,
    which may still be computing.

    The parameters go in as their flat leaves: to flatten an NNX state and hash its graph at every call would take
    milliseconds a token.

    Attributes:
      depth: how many steps may be in flight at once.
    """

    depth = 1

    def __init__(self, config: Config, model: Loaded, limits: Limits, *, dtype: Any, device: jax.Device):
        self._leaves, treedef = jax.tree.flatten(model.state)
        self._device = device
        with jax.default_device(device):
            self._cache = new_cache(config, limits.pages, limits.page, dtype)

        def forward(
            leaves: list[jax.Array], cache: Cache, run: Run, at: Int[Array, "1 L"]
        ) -> tuple[Float[Array, "L V"], Cache]:
            whole = nnx.merge(model.graphdef, jax.tree.unflatten(treedef, leaves))
            return whole(_only(run), cache, at[0], dtype=dtype)

        def logits(leaves: list[jax.Array], cache: Cache, run: Run, at: Int[Array, "1 L"]) -> tuple[jax.Array, Cache]:
            out, cache = forward(leaves, cache, run, at)
            return out[None], cache

        def draw_next(
            leaves: list[jax.Array], cache: Cache, run: Run, at: Int[Array, "1 L"], draw: Draw, *, top: int | None
        ) -> tuple[Drawn, Cache]:
            out, cache = forward(leaves, cache, run, at)
            return jax.tree.map(lambda a: a[None], sample(out, _only(draw), top=top)), cache

        self._logits = jax.jit(logits, donate_argnames="cache")
        self._sample = jax.jit(draw_next, donate_argnames="cache", static_argnames="top")

    def sample(self, run: Run, at: Int[np.ndarray, "S L"], draw: Draw, *, top: int | None) -> Drawn:
        """Adds the run to the cache, draws the token after each of its tokens `at`; `top` as in `sampling.sample`."""
        with jax.default_device(self._device):
            drawn, self._cache = self._sample(self._leaves, self._cache, run, at, draw, top=top)
        return drawn

    def lower(self, run: Run, at: Int[np.ndarray, "S L"], draw: Draw, *, top: int | None) -> jax.stages.Lowered:
        """What `sample` would run, lowered."""
        with jax.default_device(self._device):
            return self._sample.lower(self._leaves, self._cache, run, at, draw, top=top)

    @property
    def compiled(self) -> int:
        """How many programs there are so far: one for each length of a step."""
        return self._logits._cache_size() + self._sample._cache_size()

    def logits(self, run: Run, at: Int[np.ndarray, "S L"]) -> Float[Array, "S L V"]:
        """Adds the run to the cache; float32 logits of its tokens `at`."""
        with jax.default_device(self._device):
            out, self._cache = self._logits(self._leaves, self._cache, run, at)
        return out


def _only(tree: Any) -> Any:
    """The one shard of arrays with a leading shard axis."""
    return jax.tree.map(lambda a: a[0], tree)


def make_run(work: Work, limits: Limits) -> tuple[Run, Int[np.ndarray, "S L"]]:
    """Lays each shard's part of the work end to end, each share padded to the tile, all to a bucket of the ladder.

    Returns:
      The run, its arrays [S, ...], and where each share's last token lies in it, padded with 0. A shard's shares keep
      their order: the n-th of them is row n.
    """
    tile = 1 if work.decode else limits.tile
    shards = work.by_shard(limits.shards)
    padded = [[-(-(share.stop - share.start) // tile) * tile for share in shares] for shares in shards]
    size = limits.bucket(max(map(sum, padded)), decode=work.decode)
    rows = size if work.decode else limits.batch
    lead = (limits.shards,)
    tokens, sequence = np.zeros((*lead, size), np.int32), np.zeros((*lead, size), np.int32)
    positions = np.full((*lead, size), -1, np.int32)
    last = np.zeros((*lead, rows), np.int32)
    table = np.zeros((*lead, rows, limits.pages_per_sequence), np.int32)
    for shard, (shares, lengths) in enumerate(zip(shards, padded, strict=True)):
        begin = 0
        for row, (share, length) in enumerate(zip(shares, lengths, strict=True)):
            end = begin + share.stop - share.start
            tokens[shard, begin:end] = share.request.tokens(share.start, share.stop)
            positions[shard, begin:end] = np.arange(share.start, share.stop)
            sequence[shard, begin : begin + length] = row
            table[shard, row, : len(share.request.pages)] = share.request.pages
            last[shard, row] = end - 1
            begin += length
    arrays: tuple[Any, ...] = (tokens, positions, sequence, table)
    return Run(*arrays, tile=tile), last


def make_draw(work: Work, shards: int, rows: int) -> Draw:
    """The sampling parameters of each share's request, arrays [S, rows], padded with greedy rows."""
    requests = [[share.request for share in shares] for shares in work.by_shard(shards)]

    def column(value: Callable[[Request], Any], dtype: Any, pad: Any) -> Any:
        return np.asarray([[value(r) for r in mine] + [pad] * (rows - len(mine)) for mine in requests], dtype)

    return Draw(
        temperature=column(lambda r: r.params.temperature, np.float32, 0.0),
        top_p=column(lambda r: r.params.top_p, np.float32, 1.0),
        top_k=column(lambda r: min(r.params.top_k, 2**31 - 1), np.int32, 0),
        seed=column(lambda r: (r.seed >> 32, r.seed & 0xFFFFFFFF), np.uint32, (0, 0)),
        position=column(lambda r: r.length, np.int32, 0),
    )
