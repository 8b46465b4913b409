# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: layers by devices, coloured by stage and partition, and bars of memory against capacity."""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktx_jax.sharding.drawing import Figure, Line, Pixels, Rect, Shape, Text
from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.memory import show_bytes

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import PlacedParameter, Plan

_HUES = (210, 28, 140, 285, 50, 335, 178, 0)  # degrees; one a stage, then over again
_SHADES = {"whole": (0.42, 0.62), "experts": (0.55, 0.55), "cut": (0.68, 0.55), "repeated": (0.86, 0.45)}
_MEANING = {
    "whole": "whole on this device",
    "experts": "cut by experts",
    "cut": "cut by heads or width",
    "repeated": "repeated on each device",
}
# Where the parts of a layer begin and end in its row.
_SPANS = {
    "whole": (0.0, 1.0),
    "self_attn": (0.0, 0.25),
    "mlp": (0.25, 1.0),
    "mlp.experts": (0.25, 0.75),
    "mlp.shared_experts": (0.75, 1.0),
}
_PARTS = {"weights": 0.45, "cache": 0.62, "workspace": 0.76, "streamed": 0.88}
_LEFT, _TOP, _GAP, _BAR = 92, 112, 6, 150
_INK, _PALE, _RED = "#222222", "#8a8a8a", "#c62828"


def draw_plan(plan: "Plan", memory: Mapping[str, int] | None = None) -> Figure:
    """See `Plan.figure`. `memory`: usable bytes by device, drawn as a line across its bar."""
    layout = _Layout.of(plan)
    width = layout.right + 24
    shapes: list[Shape] = [
        Text(16, 30, plan.name, 16, weight="bold"),
        Text(16, 50, _subtitle(plan), 11, fill=_PALE),
        Text(16, 68, "a layer's row: attention, routed experts, shared experts (or a dense MLP)", 11, fill=_PALE),
    ]
    for name, x in layout.columns.items():
        shapes.append(Text(x + layout.column / 2, _TOP - 10, name, layout.small, anchor="middle"))
    shapes += _labels(plan, layout)
    shapes += _cells(plan, layout)
    shapes += _bars(plan, layout, memory or {})
    bottom = layout.bottom + _BAR + 90
    shapes += _legend(plan, bottom)
    return Figure(max(width, 620), bottom + 22 * 3 + 16, tuple(shapes))


@dataclass(frozen=True)
class _Layout:
    columns: Mapping[str, Pixels]  # device to x
    column: Pixels
    row: Pixels
    rows: Mapping[str, Pixels]  # unit to y
    small: Pixels  # size of small text

    @classmethod
    def of(cls, plan: "Plan") -> "_Layout":
        count = len(plan.devices)
        column = max(16.0, min(96.0, 900 / count))
        columns = {name: _LEFT + i * (column + _GAP) for i, name in enumerate(plan.devices)}
        names = list(dict.fromkeys(_unit(p.path) for p in plan.parameters))
        row = max(7.0, min(14.0, 620 / len(names)))
        rows = {name: _TOP + i * (row + 1.5) for i, name in enumerate(names)}
        return cls(columns, column, row, rows, small=11 if column > 40 else 7)

    @property
    def right(self) -> Pixels:
        return max(self.columns.values()) + self.column

    @property
    def bottom(self) -> Pixels:
        return max(self.rows.values()) + self.row


def _unit(path: str) -> str:
    layer, _ = split_layer(path)
    return path.removeprefix("model.") if layer is None else f"layer {layer}"


def _subtitle(plan: "Plan") -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    stages = f"{len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''}"
    sizes = f"{plan.batch} sequences of {plan.context} tokens, cache in {plan.dtype}"
    return f"{stages}{f' of {mesh}' if mesh else ''}; {sizes}"


def _labels(plan: "Plan", layout: _Layout) -> list[Shape]:
    """Names of the rows; of the layers, every fifth."""
    wanted = {name for name in layout.rows if not name.startswith("layer ") or int(name.split()[1]) % 5 == 0}
    size = min(10.0, layout.row + 2)
    return [
        Text(_LEFT - 8, y + layout.row * 0.85, name, size, anchor="end", fill=_INK if name in wanted else _PALE)
        for name, y in layout.rows.items()
        if name in wanted
    ]


def _cells(plan: "Plan", layout: _Layout) -> list[Shape]:
    """Rectangles for each unit and device, coloured as the largest parameter of each part lies."""
    biggest: dict[tuple[str, str, str], PlacedParameter] = {}
    for p in plan.parameters:
        part = _part(p.path)
        if part is None:
            continue
        for device in p.devices:
            key = (_unit(p.path), device, part)
            if key not in biggest or p.nbytes > biggest[key].nbytes:
                biggest[key] = p
    shapes: list[Shape] = []
    for (unit, device, part), p in biggest.items():
        begin, end = _SPANS[part]
        x, lies = layout.columns[device] + begin * layout.column, _lies(p)
        wide = (end - begin) * layout.column - (1 if end < 1 else 0)
        title = f"{p.path}: {_MEANING[lies]}, {show_bytes(p.nbytes)}"
        shapes.append(Rect(x, layout.rows[unit], wide, layout.row, _colour(p.stage, lies), title=title))
    return shapes


def _part(path: str) -> str | None:
    """Which of a row's rectangles a parameter belongs to; None for norms and routers of layers, too small to see."""
    layer, kind = split_layer(path)
    if layer is None:
        return "whole"
    if kind.startswith(("self_attn.", "mlp.experts.", "mlp.shared_experts.")) and not kind.endswith("norm"):
        return kind.rpartition(".")[0]
    return "mlp" if kind in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") else None


def _lies(p: "PlacedParameter") -> str:
    if len(p.devices) == 1:
        return "whole"
    if not any(p.spec):
        return "repeated"
    return "experts" if ".experts." in p.path and p.spec[0] else "cut"


def _colour(stage: int, lies: str) -> str:
    light, saturation = _SHADES[lies]
    return _hsl(_HUES[stage % len(_HUES)], light, saturation)


def _hsl(hue: float | int, light: float, saturation: float) -> str:
    rgb = colorsys.hls_to_rgb(hue / 360, light, saturation)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def _bars(plan: "Plan", layout: _Layout, memory: Mapping[str, int]) -> list[Shape]:
    """What each device needs, in the parts of `Need`, against what it has."""
    top, base = layout.bottom + 34, layout.bottom + 34 + _BAR
    most = max([need.total for need in plan.needs.values()] + list(memory.values()) + [1])
    shapes: list[Shape] = [Text(_LEFT - 8, top + 8, "memory", 10, anchor="end")]
    for name, need in plan.needs.items():
        x, y = layout.columns[name], base
        hue = next((_HUES[i % len(_HUES)] for i, s in enumerate(plan.stages) if name in s.devices), None)
        for part, light in _PARTS.items():
            height = getattr(need, part) / most * _BAR
            y -= height
            colour = _hsl(hue or 0, light, 0.0 if hue is None else 0.5)
            shapes.append(
                Rect(x, y, layout.column, height, colour, title=f"{name}: {part} {show_bytes(getattr(need, part))}")
            )
        over = name in memory and need.total > memory[name]
        if over:
            shapes.append(Rect(x, y, layout.column, base - y, "none", stroke=_RED))
        if name in memory:
            line = base - memory[name] / most * _BAR
            shapes.append(Line(x - 2, line, x + layout.column + 2, line, _RED if over else _INK))
        middle = x + layout.column / 2
        shapes.append(
            Text(middle, base + 14, _short(need.total), layout.small, anchor="middle", fill=_RED if over else _INK)
        )
        if name in memory:
            shapes.append(
                Text(middle, base + 27, f"of {_short(memory[name])}", layout.small - 1, anchor="middle", fill=_PALE)
            )
    return shapes


def _short(count: int) -> str:
    return show_bytes(count).replace(" GB", "G").replace(" MB", "M")


def _legend(plan: "Plan", top: Pixels) -> list[Shape]:
    """Three rows: how things lie, the stages, the parts of a bar."""
    rows = [
        [(_colour(0, lies), meaning) for lies, meaning in _MEANING.items()],
        [(_colour(i, "whole"), f"stage {i}") for i in range(min(len(plan.stages), len(_HUES)))],
        [(_hsl(0, light, 0.0), part) for part, light in _PARTS.items()],
    ]
    shapes: list[Shape] = []
    for index, row in enumerate(rows):
        x, y = 16.0, top + 22 * index
        for colour, label in row:
            shapes.append(Rect(x, y - 9, 14, 10, colour))
            shapes.append(Text(x + 19, y, label, 10))
            x += 34 + 6.0 * len(label)
    return shapes
