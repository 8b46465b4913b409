# SPDX-License-Identifier: Apache-2.0
"""One stage of a model as compiled steps: its parameters, its cache, a program for each kind and length of step."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ktx_jax.engine.scheduler import Limits
from ktx_jax.model.cache import Run, new_cache
from ktx_jax.model.config import Config
from ktx_jax.sharding.load import LoadedStage

Tail: TypeAlias = Callable[[Float[Array, "L V"], Any], Any]
"""What the last stage makes of a shard's logits: a pure, hashable function of them and arrays with a row for each."""

BY_SHARD = PartitionSpec("data")


class Stage:
    """A stage's steps: one program each, from its inputs to what the next stage needs or the tail gives.

    Parameters go in as their flat leaves: to flatten an NNX state and hash its graph at every call would take
    milliseconds a token. On a mesh of several devices the whole program runs inside `jax.shard_map`, so that every
    exchange between devices is one that the model's code asks for.
    """

    def __init__(self, config: Config, loaded: LoadedStage, limits: Limits, *, dtype: Any):
        self.mesh, self._dtype = loaded.mesh, dtype
        self._parts = {decode: loaded.part(decode=decode) for decode in (False, True)}
        self._leaves = {decode: jax.tree.leaves(part.state) for decode, part in self._parts.items()}
        self._by_shard = NamedSharding(self.mesh, BY_SHARD)
        self._blocks = self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"
        make = partial(new_cache, config, len(loaded.layers), limits.shards * limits.pages, limits.page, dtype)
        self.cache = jax.jit(make, out_shardings=self._by_shard)()
        self.program: Any = jax.jit(self._program, donate_argnames="cache", static_argnames=("tail", "decode"))

    def __call__(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, decode: bool) -> Any:
        """Adds the run to the cache; what the next stage needs, or for the last one what `tail` gives.

        Args:
          x: what the stage before gave, on any devices; None for the first.
          run, at, extra: arrays with a leading shard axis.
        """
        x = None if x is None else jax.device_put(x, self._by_shard)
        out, self.cache = self.program(self._leaves[decode], self.cache, x, run, at, extra, tail=tail, decode=decode)
        if self._blocks:  # steps of several virtual CPU devices that overlap can wait for each other's threads forever
            jax.block_until_ready(out)
        return out

    def lower(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, decode: bool) -> jax.stages.Lowered:
        """What a call would run, lowered; all arrays may be abstract."""
        return self.program.lower(self._leaves[decode], self.cache, x, run, at, extra, tail=tail, decode=decode)

    def _program(
        self, leaves: list[Any], cache: Any, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, decode: bool
    ) -> Any:
        compute = partial(self._compute, tail=tail, decode=decode)
        if self.mesh.size > 1:
            specs = [leaf.sharding.spec for leaf in self._leaves[decode]]
            inputs = (specs, *[BY_SHARD] * 5)
            compute = jax.shard_map(
                compute, mesh=self.mesh, in_specs=inputs, out_specs=(BY_SHARD, BY_SHARD), check_vma=False
            )  # fmt: skip
        return compute(leaves, cache, x, run, at, extra)

    def _compute(
        self, leaves: list[Any], cache: Any, x: Any, run: Run, at: Int[Array, "1 L"], extra: Any,
        *, tail: Tail, decode: bool,
    ) -> Any:  # fmt: skip
        """The stage on one shard of the data axis."""
        part = self._parts[decode]
        model = nnx.merge(part.graphdef, jax.tree.unflatten(jax.tree.structure(part.state), leaves))
        x, run, at, extra = jax.tree.map(lambda a: a[0], (x, run, at, extra))
        out, cache = model(run, cache, at, x, dtype=self._dtype)
        if model.ends:
            out = tail(out, extra)
        return jax.tree.map(lambda a: a[None], out), cache
