# SPDX-License-Identifier: Apache-2.0
"""Modules as compiled programs on a mesh."""

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BY_SHARD = PartitionSpec("data")
"""Of every input and result of a program: a leading axis for the shards of the `data` axis."""

Method: TypeAlias = Callable[..., tuple[Any, Any]]
"""`(module, pages, *arguments)` to a result and the pages: hashable, and equal where it computes the same."""


class Program:
    """What the modules of one graph compute on one mesh; equal ones are one, so layers of a kind are compiled once.

    On several devices all of it runs inside `jax.shard_map`, so that every exchange between devices is one that the
    model's code asks for.
    """

    def __init__(self, graphdef: Any, treedef: Any, mesh: Mesh, specs: tuple[PartitionSpec, ...]):
        self.graphdef, self.treedef, self.mesh, self.specs = graphdef, treedef, mesh, specs
        self.by_shard = NamedSharding(mesh, BY_SHARD)

    def trace(self, method: Method, leaves: list[Any], pages: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """The computation, in terms of JAX."""
        compute = partial(self._on_one_shard, method)
        if self.mesh.size > 1:
            inputs, outputs = (list(self.specs), BY_SHARD, BY_SHARD), (BY_SHARD, BY_SHARD)
            compute = jax.shard_map(compute, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return compute(leaves, pages, arguments)

    def _on_one_shard(self, method: Method, leaves: list[Any], pages: Any, arguments: Any) -> tuple[Any, Any]:
        module = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
        out, pages = method(module, pages, *jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], out), pages


_program = lru_cache(maxsize=None)(Program)


@partial(jax.jit, static_argnames=("program", "method"), donate_argnames="pages")
def run(program: Program, method: Hashable, leaves: Any, pages: Any, arguments: Any) -> tuple[Any, Any]:
    """A program's method on arrays. `program` is told from others by identity: to hash a graph at every call would
    take milliseconds a token."""
    return program.trace(method, leaves, pages, arguments)  # pyright: ignore[reportArgumentType]


class Bound:
    """A module's program with its parameters, as flat leaves for the same reason.

    Args:
      graphdef, state: the module, split.
      mesh: the devices that hold the parameters.
    """

    def __init__(self, graphdef: Any, state: Any, mesh: Mesh):
        self.leaves, treedef = jax.tree.flatten(state)
        self.program = _program(graphdef, treedef, mesh, tuple(leaf.sharding.spec for leaf in self.leaves))
        # Steps of several virtual CPU devices that overlap can wait for each other's threads forever.
        self._blocks = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def __call__(self, method: Method, pages: Any, *arguments: Any) -> tuple[Any, Any]:
        """The method's result, and the pages (given away) as it leaves them. What lies elsewhere is brought here."""
        out = run(self.program, method, self.leaves, pages, self._brought(arguments))
        return jax.block_until_ready(out) if self._blocks else out

    def lower(self, method: Method, pages: Any, *arguments: Any) -> jax.stages.Lowered:
        """What a call would run; arrays may be abstract."""
        return run.lower(self.program, method, self.leaves, pages, arguments)

    def _brought(self, arguments: Any) -> Any:
        def bring(value: Any) -> Any:
            away = isinstance(value, jax.Array) and value.sharding.device_set != self.program.by_shard.device_set
            return jax.device_put(value, self.program.by_shard) if away else value

        return jax.tree.map(bring, arguments)
