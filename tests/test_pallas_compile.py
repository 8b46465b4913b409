# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels through the real compiler, for an H200 that is not here: in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from pallas_kernels.heuristics import SHARED_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gpu_compiler")]


def _compiled(tmp_path, model: str, *words: str) -> list[dict]:
    out = tmp_path / "compiled.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_compile.py"), "--models", model, "--json", str(out)]
    command += ["--only", *words]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())["cases"]


def _check(cases: list[dict], kernels: int) -> None:
    # A kernel that an earlier case has compiled is not compiled, nor told of, again.
    assert len(cases[0]["registers"]) == kernels
    for case in cases:
        assert len(case["registers"]) == len(case["shared"]) <= kernels, case
        assert case["spilled"] == 0, case
        assert not case["warnings"], case
        assert max(case["shared"], default=0) <= SHARED_BYTES, case
        # No weight is dequantized, no expert made dense: what is beside the kernels is activations.
        assert case["temporaries"] < 2 << 30, case


@pytest.mark.parametrize("rows", ["1 rows", "512 rows"])
def test_matmul_of_every_type(tmp_path, rows):
    cases = _compiled(tmp_path, "v2.5", "dense gate", f", {rows}")
    assert len(cases) == 8
    _check(cases, 1)


def test_matmul_of_widths_that_64_alone_divides(tmp_path):
    _check(_compiled(tmp_path, "lite", "dense"), 1)


@pytest.mark.parametrize("model", ["v2.5", "lite"])
def test_experts(tmp_path, model):
    _check(_compiled(tmp_path, model, "experts"), 2)


@pytest.mark.parametrize("model", ["v2.5", "lite"])
def test_attention(tmp_path, model):
    _check(_compiled(tmp_path, model, "attention"), 2)  # and the merge of ranges


@pytest.mark.parametrize("model", ["v2.5", "lite"])
@pytest.mark.parametrize("kernel", ["router", "norm of", "latents"])
def test_rows(tmp_path, model, kernel):
    _check(_compiled(tmp_path, model, kernel), 1)


@pytest.mark.parametrize("model", ["v2.5", "lite"])
def test_attention_of_prompts(tmp_path, model):
    cases = _compiled(tmp_path, model, "prompts")
    assert len(cases) == 6
    _check(cases, 3)
    assert max(case["temporaries"] for case in cases) < 1 << 29
