# SPDX-License-Identifier: Apache-2.0
"""`Plan`: for every parameter of a model its stage, devices, partition, bytes and operators, before a byte is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType

from ktx_jax.errors import KtxError
from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Choices, Ops, Spec
from ktx_jax.sharding.devices import HOST, device_number
from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.gpu_kernels import PALLAS, XLA, default_implementation, why_not_in, why_not_on
from ktx_jax.sharding.kernel_ops import Wanted, settle
from ktx_jax.sharding.memory import (
    CACHE_BYTES,
    Need,
    cache_bytes,
    chunk_tokens,
    host_workspace_bytes,
    sum_needs,
    workspace_bytes,
)
from ktx_jax.sharding.operators import Accelerators, check_operators, filled_ops, runnable_ops, yielded_notice
from ktx_jax.sharding.parameters import Inventory, Types, inventory
from ktx_jax.sharding.partition import cuts, partition
from ktx_jax.sharding.placement import Placement, place
from ktx_jax.sharding.problems import Findings
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.runnable import check_layers
from ktx_jax.sharding.units import units

if TYPE_CHECKING:
    from ktx_jax.sharding.targets import Target

GPU = "gpu"


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter and all that is decided about it.

    Attributes:
      path: the module path.
      shape: logical.
      ggml_type: in the file; stored_type: in memory.
      stage: which computes with it.
      devices: that hold it, each a piece of `nbytes`.
      spec: mesh axes that cut each dimension, () for one that is whole.
      nbytes: of a piece, padding included; of both of its forms where prefill and decode read different ones.
      ops: implementations; None leaves the choice to the run. Where kernels cannot compute with it, that which does.
      prefill_device: where it is streamed for long prompts, or None; streamed_bytes: of a piece there.
    """

    path: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    stored_type: GGMLQuantizationType
    stage: int
    devices: tuple[str, ...]
    spec: Spec
    nbytes: int
    ops: Ops
    prefill_device: str | None
    streamed_bytes: int = 0

    def partition_spec(self) -> Any:
        """`spec` as a `jax.sharding.PartitionSpec`."""
        from jax.sharding import PartitionSpec

        return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in self.spec))


@dataclass(frozen=True)
class Stage:
    """What one executable computes: consecutive layers, the first stage with the embedding, the last with the head."""

    devices: tuple[str, ...]
    layers: tuple[int, ...]
    others: tuple[str, ...]  # paths outside the layers

    def data(self, mesh: Mapping[str, int]) -> int:
        """Shards of the data axis, each with requests and a cache of its own."""
        return mesh.get("data", 1) if len(self.devices) > 1 else 1


@dataclass(frozen=True)
class Plan:
    """Where everything lies. Made by `from_rules`; immutable.

    Attributes:
      name: of the rules.
      mesh: the size of each axis of a stage's mesh.
      stages: in the order in which they compute.
      parameters: all, in the order in which they are used.
      context, batch, dtype: what the cache is made for.
      prefill_threshold: tokens above which a prompt is prefilled with streamed weights, or None.
      platform: what `gpu:N` stands for: "gpu" or "cpu".
      notices: what the user should know.
    """

    name: str
    config: Config
    mesh: Mapping[str, int]
    stages: tuple[Stage, ...]
    parameters: tuple[PlacedParameter, ...]
    context: int
    batch: int
    dtype: str
    prefill_threshold: int | None
    platform: str
    notices: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_rules(
        cls,
        config: Config,
        rules: Rules,
        *,
        devices: int | None = None,
        types: Types | str = "q4_k_m",
        context: int = 4096,
        batch: int = 8,
        dtype: str = "bfloat16",
        platform: str = GPU,
        implementation: str = XLA,
        no_kernels: str | None = None,
    ) -> "Plan":
        """Resolves rules for a model.

        Args:
          config: the model.
          rules: the rule file.
          devices: how many accelerators there are; None for as many as the rules name.
          types: each parameter's ggml type by path (`parameters.file_types`), or the name of a mix (`q4_k_m`).
          context, batch, dtype: tokens of a sequence, sequences at once, "bfloat16" or "float32": the cache's size.
          platform: what `gpu:N` is bound to: "gpu", or "cpu" for virtual devices.
          implementation: what computes there where rules leave it open: "xla" or "pallas".
          no_kernels: why "pallas" cannot run there (`gpu_kernels.why_not_on`), or None.

        Raises:
          RulesError: everything in the rules that does not suit the model, each with its line.
          KtxError: an argument is out of range, or the implementation cannot run.
        """
        findings = Findings()
        model = inventory(config, types)
        choices = rules.choices(model, findings)
        no_kernels = no_kernels or why_not_in(dtype)
        if implementation == PALLAS and (platform != GPU or no_kernels):
            raise KtxError(f"implementation 'pallas' cannot run: {no_kernels or 'it computes on GPUs'}")
        there = Accelerators(platform, implementation, no_kernels)
        plan = _build(rules.name, model, choices, findings, context, batch, dtype, there)
        _check_devices(plan, choices, devices, findings)
        findings.raise_if_any(rules.name)
        return plan.resized(context=context, batch=batch)

    @classmethod
    def for_target(cls, config: Config, rules: Rules, target: "Target | None", **sizes: Any) -> "Plan":
        """`from_rules` for devices of kind `target`, where open operations go to what computes there by default.

        Args:
          target: None for GPUs of which nothing is known.
          sizes: the other arguments of `from_rules`.
        """
        if target is None or target.platform != GPU:
            return cls.from_rules(config, rules, platform=GPU if target is None else target.platform, **sizes)
        implementation = default_implementation(target.capability, sizes.get("dtype", "bfloat16"))
        no_kernels = why_not_on(target.capability)
        return cls.from_rules(config, rules, implementation=implementation, no_kernels=no_kernels, **sizes)

    def resized(self, *, context: int | None = None, batch: int | None = None) -> "Plan":
        """The same plan for other sizes. Raises `KtxError` for a context that the model does not have."""
        context, batch = context or self.context, batch or self.batch
        longest = self.config.max_position_embeddings
        if not 1 < context <= longest:
            raise KtxError(f"context should be from 2 to the model's {longest}; found {context}")
        if batch < 1 or self.dtype not in CACHE_BYTES:
            raise KtxError(f"batch should be at least 1 and dtype one of {', '.join(CACHE_BYTES)}; "
                           f"found {batch} and {self.dtype!r}")  # fmt: skip
        return replace(self, context=context, batch=batch)

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """All devices that hold something, the host last."""
        names = {name for stage in self.stages for name in stage.devices}
        names |= {name for parameter in self.parameters for name in parameter.devices}
        return tuple(sorted(names, key=device_number))

    def is_apart(self, parameter: PlacedParameter) -> bool:
        """Whether a parameter lies on the host, beside the devices of its stage: the one place it may lie else."""
        return parameter.devices != self.stages[parameter.stage].devices

    @cached_property
    def needs(self) -> Mapping[str, Need]:
        """Bytes that each device must have, the host's for what lies there apart."""
        parts = [(name, Need(weights=p.nbytes)) for p in self.parameters for name in p.devices]
        for index, stage in enumerate(self.stages):
            parts += [(name, self._stage_need(index, stage)) for name in stage.devices]
        parts += [(name, Need(streamed=count)) for name, count in self._streamed().items()]
        if any(map(self.is_apart, self.parameters)):
            parts.append(
                (HOST, Need(workspace=host_workspace_bytes(self.config, self.context, self.batch, self.chunk)))
            )
        needs = sum_needs(parts)
        return {name: needs[name] for name in self.devices}

    @property
    def chunk(self) -> int:
        """The most tokens of prompts in a step."""
        return chunk_tokens(self.prefill_threshold is not None)

    def _stage_need(self, index: int, stage: Stage) -> Need:
        data = self.mesh.get("data", 1)
        cache = cache_bytes(self.config, len(stage.layers), self.context, self.batch, self.dtype, data)
        here = {p.path: p for p in self.parameters if p.stage == index}
        heads = self.config.num_attention_heads
        if stage.layers:
            attention = here[f"model.layers.{stage.layers[0]}.self_attn.v_b_proj"]
            heads //= cuts(attention.spec, self.mesh)[0]
        head = here.get("lm_head")
        rows = 0 if head is None else head.shape[0] // cuts(head.spec, self.mesh)[0]
        workspace = workspace_bytes(self.config, heads, self.context, -(-self.batch // data), rows, self.chunk)
        return Need(cache=cache, workspace=workspace)

    def _streamed(self) -> dict[str, int]:
        """Twice the largest layer's streamed weights, on each device they go to."""
        layers: dict[tuple[str, int | str], int] = {}
        for p in self.parameters:
            if p.prefill_device is not None:
                layer, rest = split_layer(p.path)
                key = (p.prefill_device, rest if layer is None else layer)
                layers[key] = layers.get(key, 0) + p.streamed_bytes
        largest: dict[str, int] = {}
        for (device, _), count in layers.items():
            largest[device] = max(largest.get(device, 0), 2 * count)
        return largest

    def on_xla(self) -> "Plan":
        """The same plan with XLA as the implementation of everything."""
        return replace(self, parameters=tuple(replace(p, ops=Ops(XLA, XLA)) for p in self.parameters))

    def check(self, memory: int | Sequence[int] | Mapping[str, int]) -> Any:
        """What does not fit into `memory`, by how much, and the smallest changes that would help.

        Args:
          memory: usable bytes: of every accelerator, of each in turn, or by device name (`cpu` for the host's; without
            it the host is taken to have enough).

        Returns:
          A `fit.Fit`.
        """
        from ktx_jax.sharding.fit import check_fit

        return check_fit(self, memory)

    def summary(self, memory: Mapping[str, int] | None = None) -> str:
        """The plan as text: a table of devices, and one of parameters."""
        from ktx_jax.sharding.summary import summary

        return summary(self, memory)

    def to_json(self) -> dict[str, Any]:
        """All of the plan as JSON values."""
        from ktx_jax.sharding.plan_json import plan_json

        return plan_json(self)

    def figure(self, memory: Mapping[str, int] | None = None) -> Any:
        """A picture, layers by devices, with bars of memory: a `figure.Figure`, which has `svg()` and `png()`."""
        from ktx_jax.sharding.figure import draw_plan

        return draw_plan(self, memory)


def check_rules(
    rules: Rules, config: Config, types: Types | str, findings: Findings, platform: str = GPU
) -> tuple[str, ...]:
    """All that is wrong with rules for a model goes to `findings`; returns notices."""
    model = inventory(config, types)
    choices = rules.choices(model, findings)
    _build(rules.name, model, choices, findings, 2, 1, "bfloat16", Accelerators(platform))
    return choices.notices


def _build(
    name: str, model: Inventory, choices: Choices, findings: Findings,
    context: int, batch: int, dtype: str, there: Accelerators,
) -> Plan:  # fmt: skip
    placement = place(choices, model, findings)
    specs: dict[str, Spec] = {}
    wanted: dict[str, Wanted] = {}
    yielded: set[str | None] = set()
    for parameter in model.parameters:
        home, choice = placement.by_path[parameter.path], choices.by_path[parameter.path]
        mesh = choices.mesh if len(home.devices) > 1 else dict.fromkeys(choices.mesh, 1)
        covered = len(home.devices) > 1 and choices.uncovered == "error"
        spec = specs[parameter.path] = partition(parameter, choice, mesh, model.config, covered, findings)
        if choices.yielding_ops:
            asked, choice = choice.ops, replace(choice, ops=runnable_ops(choice, home, there))
            yielded |= {asked.decode, asked.prefill} - {choice.ops.decode, choice.ops.prefill, None}
        check_operators(parameter, choice, home, there, findings)
        wanted[parameter.path] = Wanted(parameter, cuts(spec, mesh), filled_ops(choice.ops, home, there), home.prefill)
    check_layers(model, placement, specs, choices, findings)
    settled, notices = settle(wanted, model.config)
    parameters = []
    for path, parameter in model.by_path.items():
        home, spec, (ops, nbytes, streamed) = placement.by_path[path], specs[path], settled[path]
        parameters.append(
            PlacedParameter(
                path, parameter.shape, parameter.ggml_type, parameter.stored_type, home.stage, home.devices,
                spec if len(home.devices) > 1 else ((),) * len(spec), nbytes, ops, home.prefill, streamed,
            )
        )  # fmt: skip
    return Plan(
        name, model.config, dict(choices.mesh), _stages(model, placement), tuple(parameters),
        context, batch, dtype, choices.prefill_threshold, there.platform,
        (*choices.notices, *yielded_notice(yielded, there), *notices),
    )  # fmt: skip


def _stages(model: Inventory, placement: Placement) -> tuple[Stage, ...]:
    found = []
    pairs = list(zip(units(model), placement.unit_stages, strict=True))
    for index, devices in enumerate(placement.stages):
        mine = [unit for unit, stage in pairs if stage == index]
        layers = tuple(unit.layer for unit in mine if unit.layer is not None)
        found.append(Stage(devices, layers, tuple(unit.path for unit in mine if unit.layer is None)))
    return tuple(found)


def _check_devices(plan: Plan, choices: Choices, devices: int | None, findings: Findings) -> None:
    if devices is None:
        return
    numbers = [device_number(name) for name in plan.devices if name != HOST]
    if beyond := [number for number in numbers if number >= devices]:
        findings.add(
            choices.stage_mark,
            f"the rules name gpu:{max(beyond)}, but there {'is' if devices == 1 else 'are'} {devices} "
            f"device{'' if devices == 1 else 's'}, numbered from 0",
        )
