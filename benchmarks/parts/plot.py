# SPDX-License-Identifier: Apache-2.0
"""The ratios as bars."""

from pathlib import Path

from parts.rows import Row


def draw(table: list[Row], out: Path) -> None:
    """Writes an SVG of every speed that has a peer; says so where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed here")
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    bars = [row for row in table if row.unit == "tokens/s" and row.ratio is not None][::-1]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(bars)), layout="constrained")
    axes.barh([row.work for row in bars], [row.ratio or 0.0 for row in bars], color="#4878a8")
    for at, row in enumerate(bars):
        if row.goal is not None:
            axes.plot([row.goal] * 2, [at - 0.4, at + 0.4], color="#d0702e", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed, times the best peer's (orange: goal)")
    figure.savefig(out)
    print(f"wrote {out}")
