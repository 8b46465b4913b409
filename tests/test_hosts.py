# SPDX-License-Identifier: Apache-2.0
"""Two real processes of four virtual devices each: what one process of eight says; a killed one ends the other."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hosts import PATIENCE, Process, free_port, processes

from ktx_jax.presets import Shape
from ktx_jax.synth import synthesize

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("run_hosts.py")
# Eight heads and sixteen experts; cut eight ways, every piece of a matrix is whole blocks.
SHAPE = Shape("Eight", 2, 256, 2048, 256, 8, None, 16, 1, 1, 1.0, 0.0707, kv_lora=64, nope=32, rope=16, value=256)
RULES = {name: ROOT / "configs" / "deepseek-v2-lite" / name for name in ("8gpu.yaml", "8gpu-data.yaml")}
MINUTE = 60
# Of logits and log-probabilities: Gloo adds in another order, which tips some of the kernels' fifteen bits.
TOLERANCE = {"xla": 1e-5, "ffi": 1e-2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return synthesize(SHAPE, folder / "eight.gguf", "q8_0")


@pytest.fixture
def start(folder, model):
    with processes() as started:

        def pair(rules: str, implementation: str) -> list[Process]:
            port = free_port()
            two = [Process(folder, f"{i}", SCRIPT, model, RULES[rules], implementation, 4, port, i) for i in (0, 1)]
            started.extend(two)
            return two

        yield pair


@pytest.mark.parametrize(("rules", "implementation"), [("8gpu.yaml", "xla"), ("8gpu-data.yaml", "ffi")])
def test_two_processes_write_what_one_does(start, folder, model, rules, implementation):
    leader, follower = start(rules, implementation)
    answers = json.loads(leader.wait_for("answers"))
    assert [leader.end(), follower.popen.wait(PATIENCE)] == [0, 0], leader.errors() + follower.errors()
    alone = Process(folder, "alone", SCRIPT, model, RULES[rules], implementation, 8)
    assert alone.end() == 0, alone.errors()
    truth = json.loads(alone.wait_for("answers"))
    assert answers["replies"] == truth["replies"]
    for name in ("scores", "rolling", "logits"):
        found, wanted = np.concatenate(answers[name]), np.concatenate(truth[name])
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE[implementation], err_msg=name)
    assert follower.lines("answers") == []


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_process_ends_the_other(start, killed, busy):
    pair = start("8gpu.yaml", "xla")
    pair[0].wait_for("answers")
    if busy:
        pair[0].say("on")
        pair[0].wait_for("more")
    pair[killed].popen.kill()
    begun = time.monotonic()
    other = pair[1 - killed]
    assert other.popen.wait(MINUTE) != 0
    print(f"process {1 - killed} ended {time.monotonic() - begun:.2f} s after process {killed} was killed")
    assert f"ktx-jax: process {killed} on 127.0.0.1 is gone" in other.errors()
