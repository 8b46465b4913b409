# SPDX-License-Identifier: Apache-2.0
"""The native dialect: a mesh, stages, and rules that each say one thing or several about the paths they match."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktx_jax.sharding.choices import AXES, Ops, Shard, Spec, Where
from ktx_jax.sharding.devices import HOST, device_name, expand_devices
from ktx_jax.sharding.problems import START, Findings, Mark
from ktx_jax.sharding.yaml_positions import Located

CONCERNS = ("where", "shard", "op")


@dataclass(frozen=True)
class NativeRule:
    """One row: a regex for whole paths, and what it sets. `marks` has the places of `match` and of each concern set."""

    pattern: re.Pattern[str]
    where: Where | None
    shard: Shard | None
    op: Ops | None
    marks: Mapping[str, Mark]


@dataclass(frozen=True)
class NativeRules:
    """A native file. `stages` is None where it names none: they follow from the rules' devices, or there is one."""

    mesh: Mapping[str, int]
    stages: tuple[tuple[str, ...], ...] | None
    stage_mark: Mark
    prefill_threshold: int | None
    rules: tuple[NativeRule, ...]
    broken: bool  # some rule was left out because of an error


def parse_native(document: Located, findings: Findings) -> NativeRules:
    """The rules of a document that is as the schema wants it; what else is wrong goes to `findings`."""
    mesh = _mesh(document)
    stages, stage_mark = _stages(document, mesh, findings)
    items = document.value["rules"].value
    rules = [_rule(item, mesh, stages, findings) for item in items]
    threshold = document.get("prefill_threshold")
    streamed = [rule for rule in rules if rule and rule.where and rule.where.prefill]
    if threshold is None and streamed:
        findings.add(
            streamed[0].marks["where"],
            "`prefill` names another device, but the file has no `prefill_threshold`: "
            "say how many tokens a prompt must have to be prefilled there",
        )
    if threshold is not None and not streamed:
        findings.add(
            document.key_marks["prefill_threshold"],
            "`prefill_threshold` has no effect: no rule has `device: {decode: ..., prefill: ...}`",
        )
    kept = tuple(rule for rule in rules if rule is not None)
    return NativeRules(mesh, stages, stage_mark, threshold and threshold.value, kept, broken=len(kept) < len(items))


def _mesh(document: Located) -> dict[str, int]:
    mesh = document.get("mesh")
    sizes = {} if mesh is None else mesh.plain()
    return {axis: sizes[axis] for axis in AXES if sizes.get(axis) is not None}


def _stages(
    document: Located, mesh: Mapping[str, int], findings: Findings
) -> tuple[tuple[tuple[str, ...], ...] | None, Mark]:
    node, size = document.get("stages"), math.prod(mesh.values())
    if node is None:
        return (_numbered(1, size) if size > 1 else None), START
    if isinstance(node.value, int):
        return _numbered(node.value, size), node.mark
    stages = []
    for index, item in enumerate(node.value):
        parts = item.value if isinstance(item.value, list) else [item]
        devices = tuple(name for part in parts for name in expand_devices(part.value))
        if len(devices) != size:
            findings.add(item.mark, f"stage {index} has {len(devices)} devices, but the mesh has {_show_mesh(mesh)}")
        if HOST in devices and len(devices) > 1:
            findings.add(item.mark, f"stage {index} mixes the host with other devices: a mesh is of one kind")
        stages.append(devices)
    for name, count in Counter(name for devices in stages for name in devices).items():
        if count > 1 and size > 1:
            findings.add(node.mark, f"{name} is named {count} times in `stages`: a device belongs to one mesh")
    return tuple(stages), node.mark


def _numbered(stages: int, size: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"gpu:{stage * size + i}" for i in range(size)) for stage in range(stages))


def _show_mesh(mesh: Mapping[str, int]) -> str:
    if not mesh:
        return "1 (the file has no `mesh`)"
    return f"{math.prod(mesh.values())} ({', '.join(f'{axis} {size}' for axis, size in mesh.items())})"


def _rule(
    item: Located, mesh: Mapping[str, int], stages: tuple[tuple[str, ...], ...] | None, findings: Findings
) -> NativeRule | None:
    """The rule, or None if it cannot be used."""
    before = len(findings.problems())
    where, shard, op = (item.get(key) for key in ("device", "shard", "op"))
    stage, replicate = item.get("stage"), item.get("replicate")
    if where is not None and stage is not None:
        findings.add(stage.mark, "a rule sets `stage` or `device`, not both")
    if where is None and stage is None and shard is None and op is None:
        findings.add(item.mark, "the rule sets nothing: give it `stage`, `device`, `shard` or `op`")
    if replicate is not None and shard is None:
        findings.add(replicate.mark, "`replicate` goes with `shard: [...]`, and names the axes that repeat the pieces")
    if stage is not None and stage.value >= len(stages or ((),)):
        findings.add(stage.mark, _no_such_stage(stage.value, stages))
    pattern = _pattern(item.value["match"], findings)
    sharding = None if shard is None else _shard(shard, replicate, mesh, findings)
    if pattern is None or len(findings.problems()) > before:
        return None
    marks = {"match": item.value["match"].mark}
    marks |= {name: node.mark for name, node in (("where", where or stage), ("shard", shard), ("op", op)) if node}
    return NativeRule(pattern, _where(stage, where), sharding, _ops(op), marks)


def _no_such_stage(number: int, stages: tuple[tuple[str, ...], ...] | None) -> str:
    if stages is None:
        return f"there is no stage {number}: the file has no `stages`, so there is only stage 0"
    return f"there is no stage {number}: `stages` has {len(stages)}, numbered from 0"


def _pattern(node: Located, findings: Findings) -> re.Pattern[str] | None:
    try:
        return re.compile(node.value)
    except (re.error, RecursionError, OverflowError) as error:
        findings.add(node.mark, f"{node.value!r} is not a regex: {error}")
        return None


def _where(stage: Located | None, device: Located | None) -> Where | None:
    if stage is not None:
        return Where(stage=stage.value)
    if device is None:
        return None
    if isinstance(device.value, str):
        return Where(device=device_name(device.value))
    decode, prefill = (device_name(device.value[key].value) for key in ("decode", "prefill"))
    return Where(device=decode, prefill=None if prefill == decode else prefill)


def _ops(node: Located | None) -> Ops | None:
    if node is None:
        return None
    value: Any = node.plain()
    return Ops(value, value) if isinstance(value, str) else Ops(value.get("prefill"), value.get("decode"))


def _shard(node: Located, replicate: Located | None, mesh: Mapping[str, int], findings: Findings) -> Shard | None:
    repeated = () if replicate is None else _axes(replicate)
    for axis in repeated:
        if axis not in mesh:
            findings.add(node.mark if replicate is None else replicate.mark, _no_such_axis(axis, mesh))
    if node.value == "replicate":
        if replicate is not None:
            findings.add(replicate.mark, "`shard: replicate` already repeats the parameter over every axis")
        return Shard(None)
    spec: Spec = tuple(_axes(item) for item in node.value)
    for item in node.value:
        for axis in _axes(item):
            if axis not in mesh:
                findings.add(item.mark, _no_such_axis(axis, mesh))
    for axis, count in Counter(axis for axes in spec for axis in axes).items():
        if count > 1:
            findings.add(node.mark, f"the axis {axis!r} is used {count} times: it can cut a parameter once")
        if axis in repeated:
            findings.add(node.mark, f"the axis {axis!r} both cuts the parameter and repeats it")
    return Shard(spec, repeated)


def _axes(node: Located) -> tuple[str, ...]:
    value = node.plain()
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _no_such_axis(axis: str, mesh: Mapping[str, int]) -> str:
    known = f"its axes are {', '.join(mesh)}" if mesh else f"write `mesh: {{{axis}: N}}`"
    return f"the mesh has no axis {axis!r}: {known}"
