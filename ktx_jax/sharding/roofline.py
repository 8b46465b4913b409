# SPDX-License-Identifier: Apache-2.0
"""What a step would take if every device only moved the bytes and did the operations that it must.

A lower bound, from the plan and the target's data sheet: kernels that reach their device's bandwidth, nothing between
them. Terms stand beside the sum so that one sees which one binds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ktx_jax.sharding.collectives import ALL_REDUCE, Collective, predict_collectives
from ktx_jax.sharding.devices import HOST, device_number
from ktx_jax.sharding.experts_used import experts_used
from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.memory import CACHE_BYTES
from ktx_jax.sharding.partition import cuts
from ktx_jax.sharding.step_size import StepSize
from ktx_jax.sharding.targets import Target

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import PlacedParameter, Plan


@dataclass(frozen=True)
class StageTime:
    """Of one stage, on its busiest device. Bytes and operations are of one device.

    Attributes:
      weight_bytes: weights read, of the experts those that are expected to be chosen.
      cache_bytes: latents read.
      operations: multiplications and additions.
      collective_bytes: results of collectives.
      memory_s, compute_s: to read the bytes; to do the operations. They overlap, so the longer one counts.
      collectives_s: they follow what makes their operands, and do not overlap.
      host_s: experts or embedding on the host, with activations going there and back.
      transfer_s: activations to the next stage.
    """

    weight_bytes: float
    cache_bytes: float
    operations: float
    collective_bytes: float
    memory_s: float
    compute_s: float
    collectives_s: float
    host_s: float
    transfer_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s) + self.collectives_s + self.host_s + self.transfer_s


@dataclass(frozen=True)
class Roofline:
    """A step through all stages, one after another.

    Attributes:
      tokens: of all `data` groups together.
      in_flight: how many such steps follow each other closely.
    """

    size: StepSize
    tokens: int
    in_flight: int
    stages: tuple[StageTime, ...]

    @property
    def seconds(self) -> float:
        """From the beginning of a step to its end."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def tokens_per_second(self) -> float:
        """What the slowest stage lets through; where too few steps are in flight, those in the time of one."""
        slowest = max(stage.seconds for stage in self.stages)
        return self.in_flight * self.tokens / max(self.seconds, self.in_flight * slowest)


def roofline(plan: "Plan", target: Target, size: StepSize, *, host: Target) -> Roofline:
    """The least time of a lone step of `plan` on devices of kind `target`.

    Args:
      host: the processor that computes what the plan leaves on the host.
    """
    return _roofline(plan, target, size, host, 1)


def pipelined(plan: "Plan", target: Target, size: StepSize, *, host: Target) -> Roofline:
    """The same with all stages busy: a batch is decoded in as many parts as there are stages, and chunks of prompts
    follow each other."""
    depth = len(plan.stages)
    if size.phase == "prefill":
        return _roofline(plan, target, size, host, depth)
    depth = min(depth, size.sequences)
    part = -(-size.sequences // depth)
    return _roofline(plan, target, replace(size, tokens=part, sequences=part, rows=part), host, depth)


def _roofline(plan: "Plan", target: Target, size: StepSize, host: Target, in_flight: int) -> Roofline:
    collectives = predict_collectives(plan, size)
    stages = [_Stage(plan, target, host, size, i, collectives).time() for i in range(len(plan.stages))]
    tokens = size.tokens * plan.stages[0].data(plan.mesh)
    return Roofline(size, min(tokens, plan.batch) if size.phase == "decode" else tokens, in_flight, tuple(stages))


def collective_seconds(
    target: Target, collective: Collective, devices: Sequence[str], mesh: Mapping[str, int]
) -> float:
    """Bytes around a ring of the group's devices, at the speed of the slowest link, and the hops of a tree that enters
    each host once. A sum takes both ways.

    Args:
      devices: of the stage, in the order of its mesh; the first group stands for all.
    """
    group = _first_group(devices, mesh, collective.axes)
    n, hosts = len(group), hosts_of(target, group)
    bandwidth, hops = target.link_bandwidth, (-(-n // hosts) - 1) * target.link_latency
    if hosts > 1:
        bandwidth = min(bandwidth, target.network_bandwidth * (n // hosts))
        hops += math.ceil(math.log2(hosts)) * target.network_latency
    ways = 2 if collective.kind == ALL_REDUCE else 1
    return ways * ((n - 1) / n * collective.nbytes / bandwidth + hops)


def hosts_of(target: Target, devices: Sequence[str]) -> int:
    """How many hosts these devices are in, if each host is full before the next begins."""
    return len({device_number(name) // target.devices_per_host for name in devices})


def _first_group(devices: Sequence[str], mesh: Mapping[str, int], axes: Sequence[str]) -> list[str]:
    """The devices that differ from the first one only along `axes`."""
    group, stride = [0], 1
    for axis, size in reversed(list(mesh.items())):
        if axis in axes:
            group = [i * stride + j for i in range(size) for j in group]
        stride *= size
    return [devices[i] for i in group]


class _Stage:
    def __init__(
        self, plan: "Plan", target: Target, host: Target, size: StepSize, index: int, collectives: Sequence[Collective]
    ):
        self._plan, self._size, self._index = plan, size, index
        self._target, self._host, self._config = target, host, plan.config
        self._stage = plan.stages[index]
        self._mesh = plan.mesh if len(self._stage.devices) > 1 else dict.fromkeys(plan.mesh, 1)
        self._device = host if self._stage.devices == (HOST,) else target
        self._collectives = [c for c in collectives if c.stage == index]
        mine = [p for p in plan.parameters if p.stage == index]
        self._here = [p for p in mine if p.devices == self._stage.devices]
        self._apart = [p for p in mine if p.devices != self._stage.devices]

    def time(self) -> StageTime:
        weights, operations = 0.0, 0.0
        for p in self._here:
            read, done = self._product(p)
            weights, operations = weights + read, operations + done
        cache = self._cache()
        operations += self._attention()
        seconds = math.fsum(
            collective_seconds(self._target, c, self._stage.devices, self._mesh) for c in self._collectives
        )
        return StageTime(
            weights, cache, operations, float(sum(c.nbytes for c in self._collectives)),
            memory_s=(weights + cache) / self._device.bandwidth,
            compute_s=operations / _peak(self._device, self._plan.dtype),
            collectives_s=seconds, host_s=self._host_time(), transfer_s=self._transfer(),
        )  # fmt: skip

    def _product(self, p: "PlacedParameter") -> tuple[float, float]:
        """Bytes that one device reads of a parameter in a step, and operations with it."""
        parts = cuts(p.spec, self._mesh) if len(p.devices) > 1 else (1,) * len(p.shape)
        values = math.prod(p.shape) / math.prod(parts)
        layer, kind = split_layer(p.path)
        tokens = self._size.tokens
        if kind == "model.embed_tokens" and not self._config.tie_word_embeddings:
            return min(tokens, p.shape[0]) * p.nbytes / p.shape[0] * parts[0], 0.0
        if layer is None:
            tokens = self._size.rows
        if len(p.shape) == 1:
            return float(p.nbytes), 0.0
        if not kind.startswith("mlp.experts."):
            return float(p.nbytes), 2.0 * tokens * values
        used, held = experts_used(self._config, tokens, parts[0]), p.shape[0] // parts[0]
        return p.nbytes * used.busiest / held, 2.0 * used.pairs * values / held

    def _cache(self) -> float:
        """A step reads each sequence's latents once in each layer of the stage."""
        row = self._config.latent_dim * CACHE_BYTES[self._plan.dtype]
        return float(len(self._stage.layers) * self._size.sequences * self._size.cached * row)

    def _attention(self) -> float:
        """Scores and mixing over the positions that a token sees, for the device's heads."""
        if not self._stage.layers:
            return 0.0
        c, size = self._config, self._size
        path = f"model.layers.{self._stage.layers[0]}.self_attn.v_b_proj"
        spec = next(p.spec for p in self._here if p.path == path)
        heads = c.num_attention_heads / cuts(spec, self._mesh)[0]
        seen = size.cached if size.phase == "decode" else size.cached - (size.tokens - 1) / 2
        return len(self._stage.layers) * 2.0 * size.tokens * heads * seen * (c.latent_dim + c.kv_lora_rank)

    def _host_time(self) -> float:
        """What lies on the host apart from its stage is computed there, on whole activations."""
        read, operations = 0.0, 0.0
        for p in self._apart:
            bytes_read, done = self._product(p)
            read, operations = read + bytes_read, operations + done
        visits = len({p.path.rpartition(".")[0] if ".experts." in p.path else p.path for p in self._apart})
        activation = self._size.tokens * self._config.hidden_size * CACHE_BYTES[self._plan.dtype]
        moved = visits * (2 * activation / self._target.host_bandwidth + 2 * self._target.link_latency)
        return max(read / self._host.bandwidth, operations / _peak(self._host, self._plan.dtype)) + moved

    def _transfer(self) -> float:
        if self._index + 1 == len(self._plan.stages):
            return 0.0
        following = self._plan.stages[self._index + 1].devices
        if following == self._stage.devices:
            return 0.0
        size = self._size.tokens * self._config.hidden_size * CACHE_BYTES[self._plan.dtype]
        if hosts_of(self._target, (self._stage.devices[0], following[0])) > 1:
            return size / self._target.network_bandwidth + self._target.network_latency
        return size / self._target.link_bandwidth + self._target.link_latency


def _peak(target: Target, dtype: str) -> float:
    return target.peak[dtype]
