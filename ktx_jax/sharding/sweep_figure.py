# SPDX-License-Identifier: Apache-2.0
"""A sweep as a picture: tokens a second by batch, a panel for each kind of device, a line for each rule file."""

import math
from collections.abc import Sequence
from itertools import pairwise

from ktx_jax.errors import KtxError
from ktx_jax.sharding.drawing import Figure, Line, Pixels, Rect, Shape, Text
from ktx_jax.sharding.sweep import SweepRow

_COLOURS = ("#3b6fb6", "#d1813f", "#3d9970", "#8e5bb5", "#b8a02c", "#c44569", "#2f9fa8", "#7a6a5c")
_PALE, _GRID = "#8a8a8a", "#dddddd"
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 380, 260, 70, 70, 64
_HALF = 3  # of a point's side


def draw_sweep(rows: Sequence[SweepRow]) -> Figure:
    """Decode's `pipelined_tokens_per_second` over the batch, both logarithmic; hollow where the plan does not fit.

    Rows with errors are left out; those of several contexts are lines of their own. Raises `KtxError` if none is left.
    """
    good = [row for row in rows if not row.error]
    if not good:
        raise KtxError("there is no plan to draw: all rules have errors")
    targets = list(dict.fromkeys(row.target for row in good))
    names = list(dict.fromkeys(_line_name(row, good) for row in good))
    shapes: list[Shape] = [
        Text(16, 28, "Least time of decode: tokens a second by batch", 15, weight="bold"),
        Text(16, 46, "hollow: does not fit", 11, fill=_PALE),
    ]
    for index, target in enumerate(targets):
        panel = _Panel(_LEFT + index * (_WIDTH + _GAP), good)
        mine = [row for row in good if row.target == target]
        shapes += panel.frame(target)
        for name in names:
            line = sorted((row for row in mine if _line_name(row, good) == name), key=lambda row: row.batch)
            shapes += panel.line(line, _COLOURS[names.index(name) % len(_COLOURS)])
    top = _TOP + _HEIGHT + 48
    for index, name in enumerate(names):
        shapes.append(Rect(_LEFT, top + 18 * index - 9, 14, 10, _COLOURS[index % len(_COLOURS)]))
        shapes.append(Text(_LEFT + 20, top + 18 * index, name, 11))
    return Figure(_LEFT + len(targets) * (_WIDTH + _GAP), top + 18 * len(names) + 12, tuple(shapes))


def _line_name(row: SweepRow, rows: Sequence[SweepRow]) -> str:
    several = len({other.context for other in rows}) > 1
    return f"{row.rules} ({row.devices} devices{f', {row.context} tokens' if several else ''})"


class _Panel:
    def __init__(self, left: Pixels, rows: Sequence[SweepRow]):
        self._left = left
        self._batches = sorted({row.batch for row in rows})
        speeds = [row.pipelined_tokens_per_second for row in rows]
        self._low, self._high = math.floor(math.log10(min(speeds))), math.ceil(math.log10(max(speeds)))
        self._high = max(self._high, self._low + 1)

    def _x(self, batch: int) -> float:
        first, last = math.log2(self._batches[0]), math.log2(self._batches[-1])
        return self._left + (math.log2(batch) - first) / max(last - first, 1.0) * _WIDTH

    def _y(self, speed: float) -> float:
        return _TOP + (self._high - math.log10(speed)) / (self._high - self._low) * _HEIGHT

    def frame(self, title: str) -> list[Shape]:
        shapes: list[Shape] = [Text(self._left, _TOP - 8, title, 12, weight="bold")]
        for power in range(self._low, self._high + 1):
            y = self._y(10.0**power)
            shapes.append(Line(self._left, y, self._left + _WIDTH, y, _GRID))
            shapes.append(Text(self._left - 6, y + 4, f"{10**power:g}", 10, anchor="end", fill=_PALE))
        for batch in self._batches:
            shapes.append(Text(self._x(batch), _TOP + _HEIGHT + 16, str(batch), 10, anchor="middle", fill=_PALE))
        return shapes

    def line(self, rows: Sequence[SweepRow], colour: str) -> list[Shape]:
        points = [(self._x(row.batch), self._y(row.pipelined_tokens_per_second)) for row in rows]
        shapes: list[Shape] = [Line(*a, *b, colour) for a, b in pairwise(points)]
        for row, (x, y) in zip(rows, points, strict=True):
            fill = colour if row.fits else "#ffffff"
            title = f"{row.rules}, batch {row.batch}: {row.pipelined_tokens_per_second:.0f} tokens/s, {row.bound}"
            shapes.append(Rect(x - _HALF, y - _HALF, 2 * _HALF, 2 * _HALF, fill, stroke=colour, title=title))
        return shapes
