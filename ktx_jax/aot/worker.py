# SPDX-License-Identifier: Apache-2.0
"""The compiling process, started by `compile.run_job`: `python -m ktx_jax.aot.worker JOB ANSWER`, files of pickles."""

import math
import pickle
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding

from ktx_jax.aot.compile import Answer, CompiledStep, Job
from ktx_jax.aot.hlo import read_collectives, read_kernels
from ktx_jax.engine.program import BY_SHARD
from ktx_jax.engine.sampling import Draw
from ktx_jax.engine.scheduler import Limits, Work
from ktx_jax.engine.stage import Dtypes, FusedStage
from ktx_jax.engine.step import make_draw, next_tokens
from ktx_jax.model.cache import Run
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.load import Implementations, abstract_stage
from ktx_jax.sharding.mesh import bind, one_device_mesh, stage_mesh
from ktx_jax.sharding.step_size import StepSize


def main(asked: str, answered: str) -> None:
    """Compiles what the file `asked` wants."""
    begun = time.perf_counter()
    job: Job = pickle.loads(Path(asked).read_bytes())
    compiler = _Compiler(job)
    tasks = [(index, size) for size in job.sizes for index in range(len(job.plan.stages))]
    with ThreadPoolExecutor(job.at_once) as pool:
        steps = tuple(pool.map(lambda task: compiler.step(*task), tasks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(answered).write_bytes(pickle.dumps(Answer(steps, time.perf_counter() - begun, peak)))


class _Compiler:
    def __init__(self, job: Job):
        plan = job.plan
        if job.target_config is not None:
            described = topologies.get_topology_desc(
                "", platform="cuda", topology=job.topology, target_config=job.target_config
            )
            bound = bind(plan, described.devices)
        else:
            bound = bind(plan)
        shards = plan.stages[0].data(plan.mesh)
        limits = Limits(plan.context, -(-plan.batch // shards), chunk=plan.chunk, shards=shards)
        self._plan, self._limits, self._dtype = plan, limits, jnp.dtype(plan.dtype)
        implementations = Implementations(devices=job.implementation, host=job.implementation)
        self._loaded = [
            abstract_stage(plan, index, stage_mesh(plan, index, bound), one_device_mesh(bound[HOST]), implementations)
            for index in range(len(plan.stages))
        ]
        self._stages = [
            FusedStage(plan.config, loaded, limits, dtypes=Dtypes(self._dtype, self._dtype)) for loaded in self._loaded
        ]

    def step(self, index: int, size: StepSize) -> CompiledStep:
        """Lowers and compiles one program."""
        begun, decode = time.perf_counter(), size.phase == "decode"
        lowered = self._stages[index].lower(*self._inputs(index, size), tail=next_tokens, kind=size.phase)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return CompiledStep(index, size.phase, seconds=time.perf_counter() - begun, error=str(error))
        text = compiled.as_text() or ""
        memory: Any = compiled.memory_analysis()
        return CompiledStep(
            index, size.phase,
            arguments=memory.argument_size_in_bytes,
            layers=tuple(self._layer_bytes(index, decode=decode).items()),
            temporaries=memory.temp_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            collectives=tuple(read_collectives(text)),
            seconds=time.perf_counter() - begun,
            kernels=tuple(read_kernels(text)),
        )  # fmt: skip

    def _inputs(self, index: int, size: StepSize) -> tuple[Any, Run, Any, Draw]:
        """A step's inputs as shapes: what the stage before gives, the run, its rows, and how to draw."""
        by_shard = NamedSharding(self._loaded[index].mesh, BY_SHARD)
        make: Any = partial(jax.ShapeDtypeStruct, sharding=by_shard)
        shards, tokens, rows = self._limits.shards, size.tokens, size.rows
        x = make((shards, tokens, self._plan.config.hidden_size), self._dtype) if index else None
        flat, row = make((shards, tokens), jnp.int32), make((shards, rows), jnp.int32)
        table = make((shards, rows, self._limits.pages_per_sequence), jnp.int32)
        run = Run(flat, flat, flat, table, tile=1 if size.phase == "decode" else self._limits.tile)
        draw = make_draw(Work((), decode=size.phase == "decode"), shards, rows)
        return x, run, row, jax.tree.map(lambda a: make(a.shape, a.dtype), draw)

    def _layer_bytes(self, index: int, *, decode: bool) -> dict[int, int]:
        """Bytes of each layer's weights and cache on a device."""
        loaded, found = self._loaded[index], {}
        for key, leaf in nnx.to_flat_state(loaded.part(decode=decode).state):
            layer, _ = split_layer(".".join(map(str, key)))
            if layer is not None:
                found[layer] = found.get(layer, 0) + sum(map(_shard_bytes, jax.tree.leaves(leaf)))
        for layer, array in zip(loaded.layers, self._stages[index].cache, strict=True):
            found[layer] += _shard_bytes(array)
        return found


def _shard_bytes(array: Any) -> int:
    return array.dtype.itemsize * math.prod(array.sharding.shard_shape(array.shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
