# SPDX-License-Identifier: Apache-2.0
"""A plan as text: what each device holds, and how each kind of parameter lies."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ktx_jax.sharding.choices import Ops, Spec
from ktx_jax.sharding.devices import show_devices
from ktx_jax.sharding.folding import fold_numbers, fold_paths, split_layer
from ktx_jax.sharding.memory import show_bytes

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import PlacedParameter, Plan

_WIDTH = 160


def summary(plan: "Plan", memory: Mapping[str, int] | None = None) -> str:
    """See `Plan.summary`. `memory`: usable bytes by device, to compare with."""
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
    console.print(_title(plan), markup=False)
    console.print(_devices(plan, memory or {}))
    console.print()
    console.print(_parameters(plan))
    for notice in plan.notices:
        console.print(f"note: {notice}", markup=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _title(plan: "Plan") -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    stages = f"{len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''}"
    cache = f"a cache in {plan.dtype} for {plan.batch} sequences of {plan.context} tokens"
    return f"{plan.name}: {stages} of {mesh}; {cache}\n"


def _devices(plan: "Plan", memory: Mapping[str, int]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("device")
    table.add_column("computes")
    streamed = any(need.streamed for need in plan.needs.values())
    columns = ["weights", "cache", "workspace", *(["streamed"] if streamed else []), "total"]
    for name in [*columns, *(["of", "left"] if memory else [])]:
        table.add_column(name, justify="right")
    for name, need in plan.needs.items():
        row = [name, _work(plan, name), *(show_bytes(getattr(need, column)) for column in columns)]
        if name in memory:
            left = memory[name] - need.total
            row += [show_bytes(memory[name]), f"{show_bytes(left)}{'' if left >= 0 else ' !'}"]
        table.add_row(*row)
    return table


def _work(plan: "Plan", device: str) -> str:
    """What a device computes, or what it holds beside the stages."""
    held = {p.path for p in plan.parameters if device in p.devices}
    parts = []
    for index, stage in enumerate(plan.stages):
        if device in stage.devices:
            layers = [f"layers {fold_numbers(stage.layers)}"] if stage.layers else []
            others = [path.removeprefix("model.") for path in stage.others if path in held]
            parts.append(f"stage {index}: {', '.join(layers + others)}")
    apart = [p.path for p in plan.parameters if device in p.devices and device not in plan.stages[p.stage].devices]
    if apart:
        modules = dict.fromkeys(path.rpartition(".")[0] if ".experts." in path else path for path in apart)
        parts.append(", ".join(path.removeprefix("model.") for path in fold_paths(modules)))
    return "; ".join(parts)


def _parameters(plan: "Plan") -> Table:
    """One row a kind of parameter, over all stages where it lies alike."""
    table = Table(box=None, pad_edge=False)
    for name in ("parameter", "shape", "cut by", "on", "operator"):
        table.add_column(name, no_wrap=True)
    table.add_column("bytes a device", justify="right", no_wrap=True)
    groups: dict[tuple[object, ...], list[PlacedParameter]] = {}
    for p in plan.parameters:
        apart = p.devices != plan.stages[p.stage].devices
        streamed = p.prefill_device is not None
        groups.setdefault((split_layer(p.path)[1], p.shape, p.spec, apart, streamed, p.ops), []).append(p)
    for members in groups.values():
        p = members[0]
        types = "/".join(dict.fromkeys(member.stored_type.name for member in members))
        table.add_row(
            fold_paths(member.path for member in members)[0].removeprefix("model."),
            f"{' x '.join(map(str, p.shape))} {types}",
            _cut(p.spec) if len(p.devices) > 1 else "",
            _where(members),
            show_ops(p.ops),
            _most(members),
        )
    return table


def _where(members: "list[PlacedParameter]") -> str:
    homes = dict.fromkeys(show_devices(p.devices) for p in members)
    streams = dict.fromkeys(p.prefill_device for p in members if p.prefill_device)
    return "; ".join(homes) + (f", streamed to {'; '.join(streams)}" if streams else "")


def _most(members: "list[PlacedParameter]") -> str:
    """Bytes on the device that has the most of them."""
    sums: dict[tuple[str, ...], int] = {}
    for p in members:
        sums[p.devices] = sums.get(p.devices, 0) + p.nbytes
    return show_bytes(max(sums.values()))


def _cut(spec: Spec) -> str:
    """`·, tensor` for a matrix whose second dimension is cut."""
    if not any(spec):
        return "repeated"
    return ", ".join("+".join(axes) if axes else "·" for axes in spec)


def show_ops(ops: Ops) -> str:
    """An operator for people: one name where prefill and decode are alike, and nothing where it is open."""
    if ops.prefill == ops.decode:
        return ops.decode or ""
    return ", ".join(f"{op} in {phase}" for phase, op in (("prefill", ops.prefill), ("decode", ops.decode)) if op)
