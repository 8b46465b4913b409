# SPDX-License-Identifier: Apache-2.0
"""Modules as compiled programs on a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BY_SHARD = PartitionSpec("data")
"""Of every input and result of a program: a leading axis for the shards of the `data` axis."""

_ON_GPUS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
"""XLA's own choice of what goes into CUDA graphs, and branches and loops: else the host would be asked which way to go
in the middle of a token, where it is drawn."""

Method: TypeAlias = Callable[..., tuple[Any, Any]]
"""`(module, pages, *arguments)` to a result and the pages: hashable, and equal where it computes the same."""


class Program:
    """What the modules of one graph compute on one mesh. `program_of` gives it: equal ones are one.

    On several devices all of it runs inside `jax.shard_map`, so that every exchange between devices is one that the
    model's code asks for.

    Attributes:
      run: `(method, leaves, pages, arguments)`, compiled for each method (static) and each shape; takes the pages away.
    """

    def __init__(self, graphdef: Any, treedef: Any, mesh: Mesh, specs: tuple[PartitionSpec, ...]):
        self._graphdef, self._treedef, self._mesh, self._specs = graphdef, treedef, mesh, specs
        self.by_shard = NamedSharding(mesh, BY_SHARD)
        options = None if mesh.devices.flat[0].platform == "cpu" else _ON_GPUS
        self.run: Any = jax.jit(self._run, static_argnames="method", donate_argnames="pages", compiler_options=options)

    def _run(self, method: Method, leaves: list[Any], pages: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        compute = partial(self._on_one_shard, method)
        if self._mesh.size > 1:
            inputs, outputs = (list(self._specs), BY_SHARD, BY_SHARD), (BY_SHARD, BY_SHARD)
            compute = jax.shard_map(compute, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return compute(leaves, pages, arguments)

    def _on_one_shard(self, method: Method, leaves: list[Any], pages: Any, arguments: Any) -> tuple[Any, Any]:
        module = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
        out, pages = method(module, pages, *jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], out), pages


_programs: WeakValueDictionary[Any, Program] = WeakValueDictionary()


def program_of(graphdef: Any, treedef: Any, mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Program:
    """The program of a graph on a mesh: layers of a kind have the same, and are traced and compiled once.

    To hash a graph takes milliseconds: this is for loading, not for a step.
    """
    key = (graphdef, treedef, mesh, specs)
    if (program := _programs.get(key)) is None:
        program = _programs[key] = Program(*key)
    return program


class Bound:
    """A module's program with its parameters, as flat leaves: to flatten an NNX state at every call takes milliseconds.

    Args:
      graphdef, state: the module, split.
      mesh: the devices that hold the parameters.
    """

    def __init__(self, graphdef: Any, state: Any, mesh: Mesh):
        self._leaves, treedef = jax.tree.flatten(state)
        self.program = program_of(graphdef, treedef, mesh, tuple(leaf.sharding.spec for leaf in self._leaves))
        # Steps of several virtual CPU devices that overlap can wait for each other's threads forever.
        self._blocks = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def __call__(self, method: Method, pages: Any, *arguments: Any) -> tuple[Any, Any]:
        """The method's result, and the pages (given away) as it leaves them. What lies elsewhere is brought here."""
        out = self.program.run(method, self._leaves, pages, self._brought(arguments))
        return jax.block_until_ready(out) if self._blocks else out

    def lower(self, method: Method, pages: Any, *arguments: Any) -> jax.stages.Lowered:
        """What a call would run; arrays may be abstract."""
        return self.program.run.lower(method, self._leaves, pages, arguments)

    def prepare(self, method: Method, pages: Any, *arguments: Any) -> Any:
        """Compiles what a call would run, so that the call finds it; gives its result, abstract."""

        def here(value: Any) -> Any:
            abstract = isinstance(value, jax.ShapeDtypeStruct)
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=self.program.by_shard) if abstract else value

        made = self.lower(method, pages, *jax.tree.map(here, arguments)).compile()
        out, _ = jax.tree.map(
            lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
            made.out_info, made.output_shardings,
        )  # fmt: skip
        return out

    def _brought(self, arguments: Any) -> Any:
        def bring(value: Any) -> Any:
            away = isinstance(value, jax.Array) and value.sharding.device_set != self.program.by_shard.device_set
            return jax.device_put(value, self.program.by_shard) if away else value

        return jax.tree.map(bring, arguments)
