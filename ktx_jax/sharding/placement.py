# SPDX-License-Identifier: Apache-2.0
"""Which stage computes with each parameter, and which devices hold it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ktx_jax.sharding.choices import Choice, Choices, Where
from ktx_jax.sharding.devices import HOST, show_devices
from ktx_jax.sharding.parameters import ROTARY, Inventory, Parameter
from ktx_jax.sharding.problems import START, Findings
from ktx_jax.sharding.units import Unit, units

Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a parameter lives.

    Attributes:
      stage: the stage that computes with it.
      devices: those that hold it: the stage's, or the host alone for one that lies apart.
      prefill: the device it is streamed to for long prompts; None where it stays.
    """

    stage: int
    devices: tuple[str, ...]
    prefill: str | None = None


@dataclass(frozen=True)
class Placement:
    stages: Stages
    by_path: Mapping[str, Place]
    unit_stages: tuple[int, ...]


def place(choices: Choices, inventory: Inventory, findings: Findings) -> Placement:
    """Places every parameter. What contradicts goes to `findings`; the result then serves only for further checks."""
    model = units(inventory)
    placer = _Placer(choices, findings)
    if choices.stages is None and placer.by_device(model):
        stages, unit_stages = placer.derive(model)
    else:
        stages = choices.stages or (("gpu:0",),)
        unit_stages = placer.assign(model, stages)
    by_path: dict[str, Place] = {}
    for unit, stage in zip(model, unit_stages, strict=True):
        for parameter in unit.parameters:
            by_path[parameter.path] = placer.place(parameter, unit, stage, stages[stage])
        placer.check_unit(unit, by_path, stages[stage])
    if inventory.config.tie_word_embeddings and unit_stages[0] != unit_stages[-1]:
        findings.add(choices.stage_mark, "this model's head is its embedding: both must be in one stage, so it has one")
    return Placement(stages, by_path, tuple(unit_stages))


class _Placer:
    def __init__(self, choices: Choices, findings: Findings):
        self._choices, self._findings = choices, findings

    def _choice(self, path: str) -> Choice:
        return self._choices.by_path[path]

    def _where(self, parameter: Parameter) -> Where:
        return self._choice(parameter.path).where or Where()

    def by_device(self, model: list[Unit]) -> bool:
        """Whether the layers are placed by naming devices, so that stages follow from them."""
        return any(self._where(unit.anchor).device for unit in model if unit.layer is not None)

    def _apart(self, unit: Unit) -> bool:
        """Whether a unit may lie on the host beside its stage, and does."""
        return unit.layer is None and self._where(unit.main[0]).device == HOST

    def derive(self, model: list[Unit]) -> tuple[Stages, list[int]]:
        """Stages from devices: consecutive layers on one device are a stage."""
        devices: list[str] = []
        for unit in model:
            where = self._where(unit.anchor)
            devices.append(where.device or (devices[-1] if devices else "gpu:0"))
            for parameter in unit.main:
                self._check_covered(parameter, by="device")
        layers = [device for unit, device in zip(model, devices, strict=True) if unit.layer is not None]
        stages: list[tuple[str, ...]] = []
        numbers: list[int] = []
        for unit, device in zip(model, devices, strict=True):
            beside = stages[-1][0] if stages else layers[0]
            home = beside if self._apart(unit) else device
            if not stages or stages[-1] != (home,):
                stages.append((home,))
            numbers.append(len(stages) - 1)
        return tuple(stages), numbers

    def assign(self, model: list[Unit], stages: Stages) -> list[int]:
        """The stage of each unit where the file lists stages, or has only one."""
        numbers: list[int] = []
        for unit in model:
            for parameter in unit.main:
                if len(stages) > 1:
                    self._check_covered(parameter, by="stage")
            numbers.append(self._stage_of(unit, stages, numbers[-1] if numbers else 0))
        for before, after, at in zip(model, model[1:], range(1, len(model)), strict=False):
            if numbers[at] < numbers[at - 1]:
                self._findings.add(
                    self._choice(after.anchor.path).where_mark,
                    f"{after.name} is in stage {numbers[at]}, but {before.name}, which comes before it, is in stage "
                    f"{numbers[at - 1]}: stages follow each other in the order in which the model computes",
                )
        if self._choices.uncovered == "error" and (idle := sorted(set(range(len(stages))) - set(numbers))):
            self._findings.add(
                self._choices.stage_mark,
                f"stage{'s' if len(idle) > 1 else ''} {', '.join(map(str, idle))} of {len(stages)} would have nothing "
                "to do: no rule places a module there",
            )
        return numbers

    def _stage_of(self, unit: Unit, stages: Stages, before: int) -> int:
        where = self._where(unit.anchor)
        if where.stage is not None:
            return where.stage
        if where.device is None or self._apart(unit):
            return before
        same = [i for i, devices in enumerate(stages) if devices == (where.device,)]
        return next((i for i in same if i >= before), same[0] if same else before)

    def _check_covered(self, parameter: Parameter, by: str) -> None:
        where = self._choice(parameter.path).where
        missing = where is None or (by == "device" and where.device is None)
        if missing and self._choices.uncovered == "error":
            self._findings.add_path(
                START, f"no rule places {{path}}: a rule that sets `{by}` must match it", parameter.path
            )

    def place(self, parameter: Parameter, unit: Unit, stage: int, devices: tuple[str, ...]) -> Place:
        """A parameter's own place, checked against that of its layer."""
        choice, where = self._choice(parameter.path), self._where(parameter)
        if parameter.is_expert and len(self._choices.stages or ()) > 1:
            self._check_covered(parameter, by="stage")
        elsewhere = where.stage not in (None, stage) or where.device not in (None, devices[0])
        if where.device is not None and len(devices) > 1 and where.device in devices:
            self._findings.add_path(
                choice.where_mark,
                f"{{path}} is placed on {where.device}, one of the {len(devices)} devices of stage {stage}: "
                "use `stage`, and `shard` to cut it",
                parameter.path,
            )
        elif elsewhere and not (where.device == HOST and (parameter.is_expert or unit.layer is None)):
            home = f"stage {where.stage}" if where.device is None else where.device
            self._findings.add_path(
                choice.where_mark,
                f"{{path}} is placed on {home}, but {unit.kind} is computed on {show_devices(devices)}"
                f" (stage {stage}): only routed experts, the embedding and the head may lie apart, on `cpu`",
                parameter.path,
            )
        holders = (HOST,) if where.device == HOST else devices
        return Place(stage, holders, self._prefill(parameter, where, devices))

    def _prefill(self, parameter: Parameter, where: Where, devices: tuple[str, ...]) -> str | None:
        if where.prefill is None or where.prefill == where.device:
            return None
        mark = self._choice(parameter.path).where_mark
        if where.prefill == HOST:
            self._findings.add_path(
                mark, "{path} would be prefilled on the host: weights are streamed to accelerators", parameter.path
            )
        elif len(devices) > 1:
            self._findings.add_path(
                mark,
                f"{{path}} would be streamed to {where.prefill}, one of the {len(devices)} "
                "devices of its stage: weights are streamed to stages of one device",
                parameter.path,
            )
        return where.prefill

    def check_unit(self, unit: Unit, by_path: Mapping[str, Place], devices: tuple[str, ...]) -> None:
        """That a layer's parts agree: where long prompts are prefilled, its experts, its rotary embedding."""
        streams = {by_path[p.path].prefill for p in unit.main}
        if len(streams) > 1:
            names = ", ".join(sorted(name or "where they are" for name in streams))
            self._findings.add_path(
                self._choice(unit.anchor.path).where_mark,
                f"the parts of {{path}} would be prefilled on different devices: {names}",
                unit.path,
            )
        computes = by_path[unit.anchor.path].prefill or devices[0]
        for parameter in unit.experts:
            place = by_path[parameter.path]
            if place.devices != by_path[unit.experts[0].path].devices:
                self._findings.add_path(
                    self._choice(parameter.path).where_mark,
                    f"{{path}} is on {place.devices[0]}, away from the layer's other experts",
                    parameter.path,
                )
            if place.prefill not in (None, HOST, computes) and len(devices) == 1:
                self._findings.add_path(
                    self._choice(parameter.path).where_mark,
                    f"{{path}} would be prefilled on {place.prefill}, but its layer on {computes}",
                    parameter.path,
                )
        if unit.layer is not None:
            self._check_rotary(unit, devices)

    def _check_rotary(self, unit: Unit, devices: tuple[str, ...]) -> None:
        path = f"{unit.path}.{ROTARY}"
        choice = self._choice(path)
        where, stage = choice.where or Where(), self._where(unit.anchor).stage
        if where.stage not in (None, stage or 0) or (where.device is not None and (where.device,) != devices):
            home = f"stage {where.stage}" if where.device is None else where.device
            self._findings.add_path(
                choice.where_mark,
                f"{{path}} is placed on {home}, but its attention is computed on {show_devices(devices)}",
                path,
            )
