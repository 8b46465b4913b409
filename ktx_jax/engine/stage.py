# SPDX-License-Identifier: Apache-2.0
"""One stage of a model as compiled steps: its parameters, its cache, a program for each kind and length of step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from ktx_jax.engine.program import BY_SHARD, Bound
from ktx_jax.engine.scheduler import Limits
from ktx_jax.model.cache import Cache, Run, copy_pages, new_cache
from ktx_jax.model.config import Config
from ktx_jax.model.modules import DeepseekV2ForCausalLM
from ktx_jax.ops.tiles import map_tiles
from ktx_jax.sharding.load import LoadedStage


@dataclass(frozen=True)
class Gathered:
    """A tail whose result every shard of the data axis has whole, as process 0 may have devices of one of them only."""

    tail: Any


Tail: TypeAlias = Callable[[Float[Array, "L V"], Any], Any] | Gathered
"""What the last stage makes of a shard's logits: a pure, hashable function of them and arrays with a row for each; it
gives arrays with a row for each."""

Kind: TypeAlias = Literal["prefill", "decode", "stream"]
"""Of a step: prompts, one token a sequence, or prompts with weights that are brought to the devices."""


@dataclass(frozen=True)
class Dtypes:
    """Of what the operations give each other, and of what the cache keeps."""

    activations: Any
    cache: Any


@runtime_checkable
class Stage(Protocol):
    """What one stage computes.

    Attributes:
      cache: of its layers, each shard's pages in turn.
    """

    cache: Cache

    def __call__(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> Any:
        """Adds the run to the cache; what the next stage needs, or for the last one what `tail` gives.

        Args:
          x: what the stage before gave, on any devices; None for the first.
          run, at, extra: arrays with a leading shard axis.
          kind: "stream" is "prefill" where nothing is streamed.
        """
        ...

    def prepare(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> Any:
        """Compiles what a call needs, of a run that is all padding; gives arrays, abstract or not, like a call's.

        `x` may be abstract.
        """
        ...


_ROWS = 128
"""For how many tokens logits are there at a time: those of 512 are 210 MB, and memory that a CPU has not used lately is
as slow to get as they are to compute."""


def ending(tail: Tail, logits: Callable[[Any], Float[Array, "L V"]], rows: Any, extra: Any) -> Any:
    """What a tail makes of the `logits` of rows, arrays `[L, ...]`, so many at a time."""
    if isinstance(tail, Gathered):
        out = ending(tail.tail, logits, rows, extra)
        if jax.lax.axis_size("data") == 1:
            return jax.tree.map(lambda a: a[None], out)
        return jax.tree.map(lambda a: jax.lax.all_gather(a, "data"), out)
    return by_rows(lambda part: tail(logits(part[0]), part[1]), (rows, extra))


def by_rows(f: Callable[[Any], Any], rows: Any) -> Any:
    """f of arrays `[L, ...]`, which takes and gives a row for each token, so many at a time."""
    first = jax.tree.leaves(rows)[0]
    count = first.shape[0]
    parts = -(-count // _ROWS)
    parts = next((n for n in range(parts, 2 * parts) if count % n == 0), 1)
    if parts == 1:
        return f(rows)
    cut = jax.tree.map(lambda a: a.reshape(parts, count // parts, *a.shape[1:]), rows)
    return jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), map_tiles(f, cut, after=first))


@dataclass(frozen=True)
class _Whole:
    """All that a stage does in a step, as one method."""

    dtype: Any
    tail: Tail

    def __call__(
        self, model: DeepseekV2ForCausalLM, cache: Cache, x: Any, run: Run, at: Any, extra: Any
    ) -> tuple[Any, Cache]:
        x, cache = model.model(run, cache, x, self.dtype)
        if not model.ends:
            return model.head(x, at), cache
        return ending(self.tail, lambda at: model.head(x, at), at, extra), cache


class FusedStage:
    """A stage whose parameters all lie on its devices: one program a step."""

    def __init__(self, config: Config, loaded: LoadedStage, limits: Limits, *, dtypes: Dtypes):
        self._dtype = dtypes.activations
        self._bound = {decode: _bind(loaded, decode) for decode in (False, True)}
        self.cache = stage_cache(config, loaded, limits, dtypes.cache)

    def __call__(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> Any:
        out, self.cache = self._bound[kind == "decode"](_Whole(self._dtype, tail), self.cache, x, run, at, extra)
        return out

    def prepare(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> Any:
        """As `Stage.prepare`; computes nothing."""
        bound = self._bound[kind == "decode"]
        return bound.prepare(_Whole(self._dtype, tail), self.cache, x, run, at, extra)

    def lower(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> jax.stages.Lowered:
        """What a call would run; arrays may be abstract."""
        return self._bound[kind == "decode"].lower(_Whole(self._dtype, tail), self.cache, x, run, at, extra)


def _bind(loaded: LoadedStage, decode: bool) -> Bound:
    part = loaded.part(decode=decode)
    return Bound(part.graphdef, part.state, loaded.mesh)


def stage_cache(config: Config, loaded: LoadedStage, limits: Limits, dtype: Any) -> Cache:
    """An empty cache of the stage's layers, on its devices: the pages of each shard of the data axis in turn.

    Abstract where the parameters are.
    """
    by_shard = NamedSharding(loaded.mesh, BY_SHARD)
    make = partial(new_cache, config, len(loaded.layers), limits.shards * limits.pages, limits.page, dtype)
    if isinstance(jax.tree.leaves(loaded.decode.state)[0], jax.ShapeDtypeStruct):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_shard), jax.eval_shape(make))
    return jax.jit(make, out_shardings=by_shard)()


def copied_pages(cache: Cache, source: Any, target: Any) -> Cache:
    """The cache after copying pages within each shard's part; arrays [S, n], see `cache.copy_pages`."""
    sharding = cache[0].sharding
    assert isinstance(sharding, NamedSharding)
    return _copied(cache, source, target, mesh=sharding.mesh)


@jax.jit(donate_argnames="cache", static_argnames="mesh")
def _copied(cache: Cache, source: Any, target: Any, *, mesh: Mesh) -> Cache:
    def of_shard(cache: Cache, source: Int[Array, "1 n"], target: Int[Array, "1 n"]) -> Cache:
        return copy_pages(cache, source[0], target[0])

    if mesh.size == 1:
        return of_shard(cache, source, target)
    return jax.shard_map(of_shard, mesh=mesh, in_specs=BY_SHARD, out_specs=BY_SHARD, check_vma=False)(
        cache, source, target
    )
