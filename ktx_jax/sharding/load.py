# SPDX-License-Identifier: Apache-2.0
"""Fills the parameters of every stage of a plan from a GGUF file: each device gets its part, straight from the map."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ktx_ffi
from flax import nnx
from jax.sharding import Mesh

from ktx_jax.gguf.reader import GGUF
from ktx_jax.model.linear import Cut, HeadLinear, RMSNorm
from ktx_jax.model.modules import Attention, DeepseekV2ForCausalLM, Router
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.gpu_kernels import PALLAS, XLA, attention_obstacle
from ktx_jax.sharding.layout import Layout, layout_of
from ktx_jax.sharding.mesh import Binding, one_device_mesh, stage_mesh
from ktx_jax.sharding.plan import PlacedParameter, Plan
from ktx_jax.sharding.reader import Reader
from ktx_jax.sharding.sources import Source, find_source, unused_tensors
from ktx_jax.sharding.streaming import NAMES, StreamedExperts, streamed_experts

log = logging.getLogger("ktx_jax")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_READERS = 4  # parameters read at once; each holds at most one piece beyond the map


@dataclass(frozen=True)
class Implementations:
    """Of the operations that rules leave open: on a stage's devices, and on the host beside it."""

    devices: str
    host: str


@dataclass(frozen=True)
class Part:
    """What one stage computes with, for prefill or for decode: an NNX graph definition and its state."""

    graphdef: Any
    state: Any


@dataclass(frozen=True)
class LoadedStage:
    """A stage's parameters, in the form that each kind of step computes with.

    Attributes:
      mesh: its devices.
      layers: those it computes.
      begins: whether it takes tokens, as the first one does.
      apart: paths of parameters that lie on the host, beside its devices.
      host: a mesh of the host.
      streams: by layer, the experts that are brought to `mesh` for long prompts.
    """

    mesh: Mesh
    layers: tuple[int, ...]
    prefill: Part
    decode: Part
    begins: bool
    apart: frozenset[str]
    host: Mesh
    streams: dict[int, StreamedExperts]

    def part(self, *, decode: bool) -> Part:
        return self.decode if decode else self.prefill


@dataclass(frozen=True)
class Loaded:
    """A model's stages, and the host memory behind its handles, to be kept as long."""

    stages: tuple[LoadedStage, ...]
    host_weights: tuple[ktx_ffi.Weights, ...]


Leaves = dict[tuple[str, str], Any]
"""What the modules hold, by path and implementation."""


def load_model(
    gguf: GGUF,
    plan: Plan,
    bound: Binding,
    *,
    implementations: Implementations,
    repack: bool = True,
    progress: Progress | None = None,
) -> Loaded:
    """Reads every parameter: quantized weights as their blocks, norms and routers as float32, onto the plan's devices.

    For "xla" each piece is copied once, from the mapped file to the memory its array lives in. For "pallas" its device
    packs it there. For "ffi" it is repacked once into the CPU kernels' layout; without `repack` the kernels read the
    mapped file itself.

    Args:
      implementations: of the operations that the rules leave open.

    Raises:
      GGUFError: a tensor is missing or misshapen; nothing has been read then.
    """
    sources = {p.path: find_source(gguf, plan.config, p.path, p.shape) for p in plan.parameters}
    _report_unused(gguf, plan, list(sources.values()))
    meshes = [stage_mesh(plan, index, bound) for index in range(len(plan.stages))]
    host = one_device_mesh(bound[HOST])
    layouts = {
        (p.path, op): _layout(plan, p, meshes[p.stage], host, op)
        for p in plan.parameters
        for op in {op_of(p, implementations, decode=decode) for decode in (False, True)}
    }
    reader = Reader(gguf, repack)
    order = sorted(layouts, key=lambda key: _place(gguf, sources[key[0]]))
    leaves = _read(reader, [(key, layouts[key], sources[key[0]]) for key in order], progress)
    reader.report()
    streams = _streams(gguf, plan, meshes, implementations, sources)
    stages = tuple(
        stage_of(plan, index, mesh, host, implementations, leaves, streams) for index, mesh in enumerate(meshes)
    )
    return Loaded(stages, tuple(reader.host_weights))


def _streams(
    gguf: GGUF, plan: Plan, meshes: list[Mesh], implementations: Implementations, sources: dict[str, Source]
) -> dict[int, StreamedExperts]:
    """By layer, what brings its experts to its device. The CPU kernels read the map where they are: nothing moves."""
    streams = {}
    by_path = {p.path: p for p in plan.parameters}
    for layer in range(plan.config.num_hidden_layers):
        paths = {name: f"model.layers.{layer}.mlp.experts.{name}" for name in NAMES}
        first = by_path.get(paths["gate_proj"])
        if first is None or first.prefill_device is None:
            continue
        items = {}
        for name, path in paths.items():
            p = by_path[path]
            op = p.ops.prefill or implementations.devices
            layout = layout_of(plan, p, meshes[p.stage], op)
            items[name] = (layout, sources[path])
        streams[layer] = streamed_experts(plan.config, items, Reader(gguf, repack=False))
    return streams


def _layout(plan: Plan, parameter: PlacedParameter, mesh: Mesh, host: Mesh, op: str) -> Layout:
    return layout_of(plan, parameter, host if plan.is_apart(parameter) else mesh, op)


def abstract_stage(plan: Plan, index: int, mesh: Mesh, host: Mesh, implementations: Implementations) -> LoadedStage:
    """A stage with shapes and shardings in place of values: what it would be if it were loaded onto `mesh`."""
    leaves = {}
    for p in plan.parameters:
        if p.stage == index:
            for decode in (False, True):
                op = op_of(p, implementations, decode=decode)
                leaves[p.path, op] = _layout(plan, p, mesh, host, op).abstract()
    return stage_of(plan, index, mesh, host, implementations, leaves, {})


def op_of(parameter: PlacedParameter, implementations: Implementations, *, decode: bool) -> str:
    """The implementation that computes with a parameter: the plan's, or the run's."""
    default = implementations.host if parameter.devices == (HOST,) else implementations.devices
    # What is streamed for long prompts has its prefill implementation there, and this one otherwise.
    streamed = parameter.prefill_device is not None
    return (parameter.ops.decode if decode or streamed else parameter.ops.prefill) or default


def stage_of(
    plan: Plan,
    index: int,
    mesh: Mesh,
    host: Mesh,
    implementations: Implementations,
    leaves: Leaves,
    streams: dict[int, StreamedExperts],
) -> LoadedStage:
    """The modules of a stage around its parameters."""
    stage = plan.stages[index]
    mine = [p for p in plan.parameters if p.stage == index]
    layers = {f"model.layers.{layer}" for layer in stage.layers}
    ops = [{p.path: op_of(p, implementations, decode=decode) for p in mine} for decode in (False, True)]

    def part(op: dict[str, str]) -> Part:
        model = nnx.eval_shape(
            lambda: DeepseekV2ForCausalLM(
                plan.config, rngs=nnx.Rngs(0), has=lambda path: path in layers or path in stage.others
            )
        )
        _prepare(model, {p.path: p for p in mine}, op)
        graphdef, state = nnx.split(model)
        filled = [(key, leaf.replace(leaves[_path(key), op[_path(key)]])) for key, leaf in nnx.to_flat_state(state)]
        return Part(graphdef, nnx.from_flat_state(filled))

    prefill = part(ops[0])
    decode = prefill if ops[0] == ops[1] else part(ops[1])
    apart = frozenset(p.path for p in mine if plan.is_apart(p))
    mine_streams = {layer: streams[layer] for layer in stage.layers if layer in streams}
    return LoadedStage(mesh, stage.layers, prefill, decode, index == 0, apart, host, mine_streams)


def _path(key: tuple[Any, ...]) -> str:
    return ".".join(map(str, key[:-1]))


def _prepare(model: DeepseekV2ForCausalLM, parameters: dict[str, PlacedParameter], op: dict[str, str]) -> None:
    """Tells each module how its weight is cut and what computes with it."""
    for key, module in nnx.iter_modules(model):
        path = ".".join(map(str, key))
        if isinstance(module, Attention):
            module.implementation = _attention_op(module, op[f"{path}.o_proj"])
        if isinstance(module, Cut):
            module.cut = parameters[path].spec
        if isinstance(module, RMSNorm | Router):
            module.implementation = op[path]
        if isinstance(module, HeadLinear) and op[path] != XLA:
            module.transposed = False  # see `layout_of`


def _attention_op(module: Attention, op: str) -> str:
    """What computes an attention whose last product `op` does: the plan says where they differ."""
    return XLA if op == PALLAS and attention_obstacle(module.config) is not None else op


def _place(gguf: GGUF, source: Source) -> tuple[str, int]:
    info = gguf.tensors[source.tensor]
    return str(info.file), info.offset


def _report_unused(gguf: GGUF, plan: Plan, sources: list[Source]) -> None:
    if unused := unused_tensors(gguf, {source.tensor for source in sources}, plan.config):
        log.warning("%s: %d tensors are not part of the model and are not read: %s",
                    gguf.path, len(unused), ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else ""))  # fmt: skip


def _read(reader: Reader, items: list[tuple[Any, Layout, Source]], progress: Progress | None) -> Leaves:
    """Reads all, several at once."""
    total, done, lock = sum(source.blocks.nbytes for _, _, source in items), 0, threading.Lock()

    def read(item: tuple[Any, Layout, Source]) -> Any:
        nonlocal done
        _, layout, source = item
        leaf = reader.read(layout, source)
        with lock:
            done += source.blocks.nbytes
            if progress is not None:
                progress(done, total)
        return leaf

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip((key for key, _, _ in items), pool.map(read, items), strict=True))
