# SPDX-License-Identifier: Apache-2.0
"""Models that run by every rule file of `configs`, on virtual devices: they answer as on one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from plan_golden import ONE_HOST

pytestmark = pytest.mark.slow

CASES = [(f"{path.parent.name}/{path.stem}", op) for path in ONE_HOST for op in ("xla", "ffi")]
SCORED = ("8gpu-data", "cpu-experts")  # as in the worker
WORKER = Path(__file__).with_name("run_plans.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str], dict]:
    folder = tmp_path_factory.mktemp("models")
    done = subprocess.run([sys.executable, WORKER, folder], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    return {(line["config"], line["implementation"]): line for line in lines}


@pytest.mark.parametrize(("config", "implementation"), CASES)
def test_a_plan_answers_as_one_device_does(found, config, implementation):
    result = found[config, implementation]
    assert result["same"]
    assert result["kl"] < 1e-6
    if implementation == "ffi" and not result["sums_over_devices"]:
        assert result["kl"] == 0


@pytest.mark.parametrize("config", [config for config, op in CASES if op == "xla"])
def test_a_device_holds_the_bytes_that_the_plan_says(found, config):
    for planned, live in found[config, "xla"]["bytes"].values():
        assert abs(live - planned) <= 0.02 * planned


@pytest.mark.parametrize(("config", "implementation"), [case for case in CASES if case[0].endswith(SCORED)])
def test_scores_on_a_mesh_and_beside_experts_on_the_host(found, config, implementation):
    result = found[config, implementation]
    assert result["copies"] > 0
    if implementation == "xla":
        assert result["scores_apart"] < 1e-5
    elif result["sums_over_devices"]:
        assert result["scores_apart"] < 1e-3  # fifteen bits, in another order
    else:
        assert result["scores_apart"] == 0
