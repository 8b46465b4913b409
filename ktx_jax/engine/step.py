# SPDX-License-Identifier: Apache-2.0
"""The compiled steps: a run of tokens through the model, and the draw of what comes next."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ktx_jax.engine.layered import LayeredStage
from ktx_jax.engine.likelihood import likelihood
from ktx_jax.engine.requests import Request
from ktx_jax.engine.sampling import Draw, Drawn, sample
from ktx_jax.engine.scheduler import Limits, Work
from ktx_jax.engine.stage import Dtypes, FusedStage, Kind, Stage, Tail, copied_pages
from ktx_jax.model.cache import Run
from ktx_jax.model.config import Config
from ktx_jax.sharding.load import Loaded, LoadedStage


def next_tokens(logits: Float[Array, "L V"], draw: Draw) -> Drawn:
    """A tail that draws."""
    return sample(logits, draw, top=None)


def whole_logits(logits: Float[Array, "L V"], _: Any) -> Float[Array, "L V"]:
    """A tail that gives the logits as they are."""
    return logits


class Steps:
    """The compiled steps of a whole model: its stages, one after another.

    Inputs are NumPy arrays with a leading axis for the shards of the `data` axis; results are arrays on the devices,
    which may still be computing. Then a step of the next run may already start in the first stage.

    Attributes:
      depth: how many steps keep all stages busy.
    """

    def __init__(self, config: Config, model: Loaded, limits: Limits, *, dtypes: Dtypes):
        self.stages = [_stage(config, stage, limits, dtypes) for stage in model.stages]
        self.depth = len(self.stages)

    def sample(self, run: Run, at: Int[np.ndarray, "S L"], draw: Draw, *, kind: Kind) -> Drawn:
        """Adds the run to the cache, draws the token after each of its tokens `at`."""
        return self._through(run, at, draw, next_tokens, kind)

    def logits(self, run: Run, at: Int[np.ndarray, "S L"], *, kind: Kind = "prefill") -> Float[Array, "S L V"]:
        """Adds the run to the cache; float32 logits of its tokens `at`."""
        return self._through(run, at, None, whole_logits, kind)

    def score(
        self, run: Run, at: Int[np.ndarray, "S L"], target: Int[np.ndarray, "S L"]
    ) -> tuple[Float[Array, "S L"], Bool[Array, "S L"]]:
        """Adds the run to the cache; how likely `target` is after each of its tokens `at`, as `likelihood` says."""
        return self._through(run, at, target, likelihood, "prefill")

    def copy_pages(self, source: Int[np.ndarray, "S n"], target: Int[np.ndarray, "S n"]) -> None:
        """Copies pages within each shard's part of the cache, as `cache.copy_pages`."""
        for stage in self.stages:
            stage.cache = copied_pages(stage.cache, source, target)

    def close(self) -> None:
        """Says that there will be no more steps, to whoever computes them too."""

    def prepare(self, run: Run, at: Int[np.ndarray, "S L"], extra: Any, tail: Tail, kind: Kind) -> Any:
        """Compiles a step of a run that is all padding; arrays, abstract or not, like what it gives."""
        x = None
        for stage in self.stages:
            x = stage.prepare(x, run, at, extra, tail=tail, kind=kind)
        return x

    def _through(self, run: Run, at: np.ndarray, extra: Any, tail: Tail, kind: Kind) -> Any:
        x = None
        for stage in self.stages:
            x = stage(x, run, at, extra, tail=tail, kind=kind)
        return x


def _stage(config: Config, loaded: LoadedStage, limits: Limits, dtypes: Dtypes) -> Stage:
    kind = LayeredStage if loaded.apart else FusedStage
    return kind(config, loaded, limits, dtypes=dtypes)


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
    run, last = padding(limits, size, rows, tile)
    names = ("tokens", "positions", "sequence", "block_table")
    tokens, positions, sequence, table = (np.asarray(getattr(run, name)) for name in names)
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
    return run, last


def padding(limits: Limits, tokens: int, rows: int, tile: int) -> tuple[Run, Int[np.ndarray, "S L"]]:
    """A run of so many tokens of `rows` sequences that are none, and which of them are last."""
    lead = (limits.shards,)
    flat: Any = np.zeros((*lead, tokens), np.int32)
    positions: Any = np.full((*lead, tokens), -1, np.int32)
    table: Any = np.zeros((*lead, rows, limits.pages_per_sequence), np.int32)
    return Run(flat, positions, flat.copy(), table, tile=tile), np.zeros((*lead, rows), np.int32)


def make_draw(work: Work, shards: int, rows: int) -> Draw:
    """The sampling parameters of each share's request, arrays [S, rows], padded with greedy rows."""
    requests = [[share.request for share in shares] for shares in work.by_shard(shards)]

    def column(value: Callable[[Request], Any], dtype: Any, pad: Any) -> Any:
        return np.asarray([[value(r) for r in mine] + [pad] * (rows - len(mine)) for mine in requests], dtype)

    return Draw(
        temperature=column(lambda r: r.params.temperature, np.float32, 0.0),
        top_p=column(lambda r: r.params.top_p, np.float32, 1.0),
        top_k=column(lambda r: min(r.params.top_k, 2**31 - 1), np.int32, 0),
        min_p=column(lambda r: r.params.min_p, np.float32, 0.0),
        seed=column(lambda r: (r.seed >> 32, r.seed & 0xFFFFFFFF), np.uint32, (0, 0)),
        position=column(lambda r: r.length, np.int32, 0),
    )
