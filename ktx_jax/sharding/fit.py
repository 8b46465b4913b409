# SPDX-License-Identifier: Apache-2.0
"""Whether a plan fits into memory, and if not, the smallest changes that would make it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktx_jax.errors import KtxError
from ktx_jax.sharding.auto import Sizes, workspace
from ktx_jax.sharding.devices import HOST, show_devices
from ktx_jax.sharding.folding import fold_numbers, split_layer
from ktx_jax.sharding.memory import PAGE, mesh_size, show_bytes
from ktx_jax.sharding.split import split_evenly

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import Plan

_MOST_DEVICES = 64


@dataclass(frozen=True)
class Shortfall:
    """A device that the plan overfills."""

    device: str
    needed: int
    capacity: int

    @property
    def over(self) -> int:
        return self.needed - self.capacity


@dataclass(frozen=True)
class Fit:
    """What `Plan.check` finds.

    Attributes:
      shortfalls: devices without room, in order.
      changes: sentences, each of which alone would make the plan fit; empty where it does, or nothing simple would.
    """

    shortfalls: tuple[Shortfall, ...]
    changes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.shortfalls

    def __str__(self) -> str:
        if self.ok:
            return "the plan fits"
        lines = [
            f"{s.device} needs {show_bytes(s.needed)} and has {show_bytes(s.capacity)}: {show_bytes(s.over)} too little"
            for s in self.shortfalls
        ]
        changes = self.changes or ("no single change of context, batch, experts on the host or split is enough",)
        return "\n".join([*lines, *(f"  would fit: {change}" if self.changes else f"  {change}" for change in changes)])


def capacities(plan: "Plan", memory: int | Sequence[int] | Mapping[str, int]) -> dict[str, int]:
    """Usable bytes by device name. Raises `KtxError` where `memory` does not speak of every accelerator."""
    names = [name for name in plan.devices if name != HOST or plan.stages[0].devices == (HOST,)]
    if isinstance(memory, int):
        return dict.fromkeys(names, memory)
    numbered = memory.items() if isinstance(memory, Mapping) else ((f"gpu:{i}", size) for i, size in enumerate(memory))
    given = dict(numbered)
    if missing := [name for name in names if name not in given and name != HOST]:
        raise KtxError(f"memory is given for {', '.join(given)}; the plan also uses {', '.join(missing)}")
    return {name: given[name] for name in plan.devices if name in given}


def check_fit(plan: "Plan", memory: int | Sequence[int] | Mapping[str, int]) -> Fit:
    """See `Plan.check`."""
    room = capacities(plan, memory)
    short = _shortfalls(plan, room)
    if not short:
        return Fit((), ())
    changes = (_context(plan, room), _batch(plan, room), _experts(plan, room, short), _split(plan, room, short))
    return Fit(short, tuple(change for change in changes if change is not None))


def _shortfalls(plan: "Plan", room: Mapping[str, int]) -> tuple[Shortfall, ...]:
    pairs = ((name, plan.needs[name].total) for name in room)
    return tuple(Shortfall(name, needed, room[name]) for name, needed in pairs if needed > room[name])


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` that fits, if any does."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _context(plan: "Plan", room: Mapping[str, int]) -> str | None:
    pages = _largest(1, plan.context // PAGE, lambda n: not _shortfalls(plan.resized(context=n * PAGE), room))
    return None if pages is None else f"a context of {pages * PAGE} in place of {plan.context}"


def _batch(plan: "Plan", room: Mapping[str, int]) -> str | None:
    batch = _largest(1, plan.batch - 1, lambda n: not _shortfalls(plan.resized(batch=n), room))
    return None if batch is None else f"a batch of {batch} in place of {plan.batch}"


def _experts(plan: "Plan", room: Mapping[str, int], short: tuple[Shortfall, ...]) -> str | None:
    """The fewest layers whose experts go to the host, from the end of each stage that lacks room."""
    pieces: dict[int, dict[int, int]] = {}
    moved_bytes: dict[int, int] = {}
    for p in plan.parameters:
        layer, kind = split_layer(p.path)
        if layer is not None and kind.startswith("mlp.experts.") and p.devices != (HOST,):
            stage = pieces.setdefault(p.stage, {})
            stage[layer] = stage.get(layer, 0) + p.nbytes
            moved_bytes[layer] = moved_bytes.get(layer, 0) + p.nbytes * _copies(plan, p.spec)
    lacking = {s.device: s.over for s in short}
    moved: list[int] = []
    for index, stage in enumerate(plan.stages):
        over = max((lacking.pop(name, 0) for name in stage.devices), default=0)
        for layer, count in sorted(pieces.get(index, {}).items(), reverse=True):
            if over <= 0:
                break
            moved.append(layer)
            over -= count
        if over > 0:
            return None
    if lacking or not moved:
        return None
    size = sum(moved_bytes[layer] for layer in moved)
    need = size + (plan.needs[HOST].total if HOST in plan.needs else 0)
    if HOST in room and need > room[HOST]:
        return None
    return f"the experts of layers {fold_numbers(moved)} on the host, which then needs {show_bytes(need)}"


def _copies(plan: "Plan", spec: Sequence[Sequence[str]]) -> int:
    """Pieces that together are the whole parameter."""
    parts = 1
    for axes in spec:
        for axis in axes:
            parts *= plan.mesh[axis]
    return parts


def _split(plan: "Plan", room: Mapping[str, int], short: tuple[Shortfall, ...]) -> str | None:
    """Another number of layers a stage; else more devices."""
    if len(plan.stages) > 1 and (counts := _rebalanced(plan, room)) is not None:
        now = [len(stage.layers) for stage in plan.stages]
        return f"{', '.join(map(str, counts))} layers in the stages in place of {', '.join(map(str, now))}"
    return _more_devices(plan, room, short)


def _layer_costs(plan: "Plan") -> tuple[list[int], list[int]]:
    """Bytes of each layer on a device of its stage, and of what else each stage holds."""
    costs, rest = [0] * plan.config.num_hidden_layers, [0] * len(plan.stages)
    for p in plan.parameters:
        if p.devices == (HOST,):
            continue
        layer, _ = split_layer(p.path)
        if layer is None:
            rest[p.stage] += p.nbytes
        else:
            costs[layer] += p.nbytes
    for stage in plan.stages:
        cache = plan.needs[stage.devices[0]].cache // max(1, len(stage.layers))
        for layer in stage.layers:
            costs[layer] += cache
    for index, stage in enumerate(plan.stages):
        need = plan.needs[stage.devices[0]]
        rest[index] += need.workspace + need.streamed
    return costs, rest


def _rebalanced(plan: "Plan", room: Mapping[str, int]) -> list[int] | None:
    if len({name for stage in plan.stages for name in stage.devices}) < mesh_size(plan.mesh) * len(plan.stages):
        return None  # a device serves two stages: its room cannot be divided here
    if any(name not in room for stage in plan.stages for name in stage.devices):
        return None
    costs, rest = _layer_costs(plan)
    free = [min(room[name] for name in stage.devices) - rest[i] for i, stage in enumerate(plan.stages)]
    return None if min(free) < 0 else split_evenly(costs, free)


def _more_devices(plan: "Plan", room: Mapping[str, int], short: tuple[Shortfall, ...]) -> str | None:
    """Twice, four times, ... as many devices of the same size."""
    accelerators = [room[name] for name in room if name != HOST]
    if not accelerators or any(s.device == HOST for s in short):
        return None
    size, stage_size = min(accelerators), mesh_size(plan.mesh)
    if stage_size > 1:
        return _wider_mesh(plan, short)
    costs, _ = _layer_costs(plan)
    fixed = workspace(plan.config, Sizes(plan.context, plan.batch, plan.dtype))
    ends = [p.nbytes for p in plan.parameters if split_layer(p.path)[0] is None and p.devices != (HOST,)]
    whole = [*ends[:1], *costs, sum(ends[1:])] if len(ends) > 1 else [*costs, *ends]
    for count in range(len(plan.stages) + 1, _MOST_DEVICES + 1):
        if split_evenly(whole, [max(0, size - fixed)] * count) is not None:
            return f"layers over {count} devices of {show_bytes(size)}, in place of {len(plan.stages)}"
    return None


def _wider_mesh(plan: "Plan", short: tuple[Shortfall, ...]) -> str | None:
    """The mesh with its widest cutting axis doubled until the pieces fit, if pieces shrink as they should."""
    axis = max((name for name in plan.mesh if name != "data"), key=lambda name: plan.mesh[name], default=None)
    if axis is None:
        return None
    now, factor = plan.mesh[axis], 2
    while mesh_size(plan.mesh) * factor <= _MOST_DEVICES:
        if all(s.needed - _cut_bytes(plan, s.device, axis) * (factor - 1) // factor <= s.capacity for s in short):
            first = next(stage for stage in plan.stages if short[0].device in stage.devices)
            return f"`{axis}: {now * factor}` in the mesh in place of {now} (now {show_devices(first.devices)} a stage)"
        factor *= 2
    return None


def _cut_bytes(plan: "Plan", device: str, axis: str) -> int:
    """Bytes on a device that shrink as an axis grows."""
    return sum(p.nbytes for p in plan.parameters if device in p.devices and any(axis in axes for axes in p.spec))
