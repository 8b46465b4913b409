# SPDX-License-Identifier: Apache-2.0
"""Rectangles, lines and text, as SVG, or as PNG through matplotlib."""

import os
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

from ktx_jax.errors import KtxError

Pixels = float | int
Shape: TypeAlias = "Rect | Line | Text"


@dataclass(frozen=True)
class Rect:
    x: Pixels
    y: Pixels
    width: Pixels
    height: Pixels
    fill: str
    stroke: str = "none"
    title: str = ""  # shown where the pointer rests


@dataclass(frozen=True)
class Line:
    x1: Pixels
    y1: Pixels
    x2: Pixels
    y2: Pixels
    stroke: str


@dataclass(frozen=True)
class Text:
    x: Pixels
    y: Pixels  # of the baseline
    text: str
    size: Pixels
    anchor: str = "start"
    weight: str = "normal"
    fill: str = "#222222"


@dataclass(frozen=True)
class Figure:
    """Shapes on a page, in pixels, y downwards."""

    width: Pixels
    height: Pixels
    shapes: tuple[Shape, ...]

    def svg(self) -> str:
        """The picture as an SVG document."""
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        body = "\n".join(map(_svg, self.shapes))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n'
            f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
        )

    def png(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture as PNG, at twice the resolution. Raises `KtxError` without matplotlib (extra `plot`)."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure as Page
        except ImportError as error:
            raise KtxError("PNG needs matplotlib: pip install 'ktx-jax[plot]', or write HTML instead") from error
        page = Page(figsize=(self.width / 100, self.height / 100), dpi=200, facecolor="white")
        FigureCanvasAgg(page)
        axes = page.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.axis("off")
        for shape in self.shapes:
            _draw(axes, shape)
        page.savefig(path, format="png")


def _svg(shape: Shape) -> str:
    match shape:
        case Rect():
            title = f"<title>{escape(shape.title)}</title>" if shape.title else ""
            return (
                f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}" '
                f'fill="{shape.fill}" stroke="{shape.stroke}">{title}</rect>'
            )
        case Line():
            return (
                f'<line x1="{shape.x1:.1f}" y1="{shape.y1:.1f}" x2="{shape.x2:.1f}" y2="{shape.y2:.1f}" '
                f'stroke="{shape.stroke}" stroke-width="1.5"/>'
            )
        case Text():
            return (
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" text-anchor="{shape.anchor}" '
                f'font-weight="{shape.weight}" fill="{shape.fill}">{escape(shape.text)}</text>'
            )


def _draw(axes: "object", shape: Shape) -> None:
    from matplotlib.patches import Rectangle

    match shape:
        case Rect():
            patch = Rectangle(
                (shape.x, shape.y), shape.width, shape.height, facecolor=shape.fill, edgecolor=shape.stroke
            )
            axes.add_patch(patch)  # type: ignore[attr-defined]
        case Line():
            axes.plot([shape.x1, shape.x2], [shape.y1, shape.y2], color=shape.stroke, linewidth=1)  # type: ignore[attr-defined]
        case Text():
            align = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
            axes.text(  # type: ignore[attr-defined]
                shape.x, shape.y, shape.text, fontsize=shape.size * 0.72, ha=align, va="baseline",
                color=shape.fill, fontweight=shape.weight,
            )  # fmt: skip
