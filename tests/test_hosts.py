# SPDX-License-Identifier: Apache-2.0
"""Two real processes of four virtual devices each: the text of one process of eight, a killed one ends the other."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktx_jax.presets import Shape
from ktx_jax.synth import synthesize

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("run_hosts.py")
# Eight heads and sixteen experts; cut eight ways, every piece of a matrix is whole blocks.
SHAPE = Shape("Eight", 2, 256, 2048, 256, 8, None, 16, 1, 1, 1.0, 0.0707, kv_lora=64, nope=32, rope=16, value=256)
RULES = {name: ROOT / "configs" / "deepseek-v2-lite" / name for name in ("8gpu.yaml", "8gpu-data.yaml")}
MINUTE = 60
PATIENCE = 600  # for loading and compiling on a busy machine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return synthesize(SHAPE, folder / "eight.gguf", "q8_0")


class Process:
    """One of a run, with what it writes in files: nobody has to read while it writes."""

    def __init__(self, folder: Path, name: str, *arguments: object):
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        with self._out.open("w") as out, self._err.open("w") as err:
            command = [sys.executable, str(SCRIPT), *map(str, arguments)]
            self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env, text=True)

    def lines(self, word: str) -> list[str]:
        """What follows `word` on the lines that begin with it. Gloo writes others."""
        return [line[len(word) :] for line in self._out.read_text().splitlines() if line.startswith(word)]

    def wait_for(self, word: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not (found := self.lines(word)):
            assert self.popen.poll() is None, self.errors()
            assert time.monotonic() < deadline, f"no {word!r}: {self.errors()}"
            time.sleep(0.1)
        return found[0]

    def say(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def end(self) -> int:
        """Closes its input, and waits until it has ended."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        return self.popen.wait(PATIENCE)

    def errors(self) -> str:
        return self._err.read_text()


@pytest.fixture
def start(folder, model):
    started: list[Process] = []

    def pair(rules: str, implementation: str) -> list[Process]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        two = [Process(folder, f"{i}", model, RULES[rules], implementation, 4, port, i) for i in (0, 1)]
        started.extend(two)
        return two

    yield pair
    for process in started:
        process.popen.kill()
        process.popen.communicate()


@pytest.mark.parametrize(("rules", "implementation"), [("8gpu.yaml", "xla"), ("8gpu-data.yaml", "ffi")])
def test_two_processes_write_what_one_does(start, folder, model, rules, implementation):
    leader, follower = start(rules, implementation)
    answers = json.loads(leader.wait_for("answers"))
    assert [leader.end(), follower.popen.wait(PATIENCE)] == [0, 0], leader.errors() + follower.errors()
    alone = Process(folder, "alone", model, RULES[rules], implementation, 8)
    assert alone.end() == 0, alone.errors()
    assert answers == json.loads(alone.wait_for("answers"))
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
