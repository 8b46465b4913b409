# SPDX-License-Identifier: Apache-2.0
"""Many plans in one table, as CSV and as a picture."""

import csv
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from plan_golden import ROOT, preset

from ktx_jax.errors import KtxError
from ktx_jax.sharding.drawing import Line, Rect
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.roofline import roofline
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.step_size import step_size
from ktx_jax.sharding.sweep import sweep, write_csv
from ktx_jax.sharding.sweep_figure import draw_sweep
from ktx_jax.sharding.targets import load_target

V25 = ROOT / "configs" / "deepseek-v2.5"
BAD = Rules.from_text("mesh: {tensor: 7}\nrules: [{match: '.*', shard: [tensor]}]", "seven")


@pytest.fixture(scope="module")
def rows():
    files = [V25 / "8gpu.yaml", BAD, V25 / "8gpu-2stages.yaml"]
    return sweep(preset("v2.5"), files, ["h200", "rtx4090"], batches=(1, 64), contexts=(4096,))


def test_every_combination_is_a_row(rows):
    key = [(row.rules.rpartition("/")[2], row.target, row.batch) for row in rows]
    h200, rtx = "NVIDIA H200", "NVIDIA GeForce RTX 4090"
    assert key == [
        *[("8gpu.yaml", kind, batch) for kind in (h200, rtx) for batch in (1, 64)],
        ("seven", h200, 0), ("seven", rtx, 0),
        *[("8gpu-2stages.yaml", kind, batch) for kind in (h200, rtx) for batch in (1, 64)],
    ]  # fmt: skip
    assert all(bool(row.error) == (row.rules == "seven") for row in rows)
    assert "not divisible by tensor (7 parts)" in rows[4].error


def test_a_row_is_its_plan(rows):
    row = rows[1]
    h200 = load_target("h200")
    plan = Plan.for_target(preset("v2.5"), Rules.from_file(V25 / "8gpu.yaml"), h200, batch=64, context=4096)
    made = roofline(plan, h200, step_size(plan, "decode"), host=load_target("cpu"))
    assert row.decode_s == made.seconds
    assert (row.devices, row.context, row.fits) == (8, 4096, True)
    assert (row.needed, row.usable) == (plan.needs["gpu:0"].total, h200.usable)
    assert row.bound == "memory"
    assert not rows[3].fits  # 24 GB hold the weights, not 64 sequences beside them


def test_csv(rows, tmp_path):
    path = tmp_path / "sweep.csv"
    write_csv(rows, path)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [float(r["decode_s"]) for r in read] == [row.decode_s for row in rows]
    assert read[4]["error"] == rows[4].error


def test_a_picture_has_every_point(rows):
    figure = draw_sweep(rows)
    ET.fromstring(figure.svg())
    points = [s for s in figure.shapes if isinstance(s, Rect) and s.title]
    assert len(points) == 8
    assert sum(s.fill == "#ffffff" for s in points) == sum(not row.fits for row in rows if not row.error)
    for shape in figure.shapes:
        if isinstance(shape, Rect):
            assert 0 <= shape.x <= figure.width
            assert 0 <= shape.y <= figure.height
    assert sum(isinstance(s, Line) for s in figure.shapes) >= 4


def test_nothing_to_draw():
    with pytest.raises(KtxError, match="no plan"):
        draw_sweep(sweep(preset("v2.5"), [BAD], ["h200"]))


def test_the_example(tmp_path):
    arguments = ["--preset", "v2-lite", "--rules", ROOT / "configs" / "deepseek-v2-lite" / "2gpu.yaml"]
    arguments += ["--targets", "rtx4090", "--batches", "1", "8", "--out", tmp_path / "out"]
    program = [sys.executable, ROOT / "examples" / "sharding_sweep.py", *arguments]
    done = subprocess.run([str(a) for a in program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert "<svg" in (tmp_path / "out.svg").read_text()
