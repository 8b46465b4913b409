# SPDX-License-Identifier: Apache-2.0
"""Commands of two processes with one device each, the requests shared out between them: what one process says."""

import json
import signal
from pathlib import Path

import pytest
from eval_tasks import write_tasks
from hosts import PATIENCE, Process, free_port, processes
from serving import serving, until

from ktx_jax.resources import demo_model

RUNNER = Path(__file__).with_name("run_cli.py")
Q8 = demo_model()
Q4 = Q8.with_name("tiny-q4_k_m.gguf")
RULES = "mesh: {data: 2}\nrules:\n  - {match: '.*', shard: replicate}\n"
TEXT = "The with statement wraps the execution of a block with methods defined by a context manager. " * 12

pytestmark = pytest.mark.slow


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def several(tmp_path):
    """The options that make a command one of two processes: `several(port, index)`."""
    (tmp_path / "rules.yaml").write_text(RULES)

    def options(port: int, index: int) -> list[object]:
        place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", index]
        return ["--rules", tmp_path / "rules.yaml", *place]

    return options


@pytest.fixture
def ask(tmp_path, several):
    """Runs a command in two processes and in one; the leader's output and the lone one's."""

    def ask(*command: object, kept: str | None = None, code: int = 0) -> tuple[str, str]:
        outs = [[] if kept is None else ["--out", tmp_path / name / kept] for name in ("leads", "follows", "alone")]
        with processes() as started:
            port = free_port()
            for index, name in enumerate(("leads", "follows")):
                started.append(Process(tmp_path, name, RUNNER, *command, *outs[index], *several(port, index)))
            alone = Process(tmp_path, "alone", RUNNER, *command, *outs[2])
            started.append(alone)
            leader, follower, _ = started
            codes = [process.popen.wait(PATIENCE) for process in started]
            assert codes == [code, 0, code], leader.errors() + follower.errors() + alone.errors()
            assert follower.output() == ""
            assert not (tmp_path / "follows").exists()
            return leader.output(), alone.output()

    return ask


def test_perplexity(ask, text, tmp_path):
    two, one = ask("perplexity", Q8, text, "--window", 64, "--json", kept="windows.jsonl")
    assert json.loads(two) == json.loads(one)
    kept = [(tmp_path / name / "windows.jsonl").read_text().splitlines() for name in ("leads", "alone")]
    assert sorted(kept[0]) == sorted(kept[1])


def test_two_models_that_are_compared(ask, text):
    two, one = ask("compare", Q8, Q4, text, "--window", 64, "--json")
    assert json.loads(two) == json.loads(one)


def test_two_models_one_after_the_other(ask, text):
    text.write_text(TEXT * 6)
    two, one = ask("verify", Q8, "--text", text, code=1)  # of no published shape
    assert two == one
    assert "pass  fast path" in two


def test_tasks(ask, tmp_path):
    tasks = ",".join(write_tasks(tmp_path))
    two, one = ask("eval", Q8, "--tasks", tasks, "--include-path", tmp_path, "--json", "--context", 256, kept="")
    assert json.loads(two) == json.loads(one)
    assert sorted((tmp_path / "leads" / "answers.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "alone" / "answers.jsonl").read_text().splitlines()
    )
    assert len(list((tmp_path / "leads").rglob("results_*.json"))) == 1


BODY = {"model": "tiny-q8_0", "prompt": ["def f(x):", "The list"], "max_tokens": 8, "temperature": 0, "logprobs": 2}


def completions(server) -> list[tuple[str, list[float]]]:
    status, _, found = server.ask("/v1/completions", BODY)
    assert status == 200, found
    return [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in found["choices"]]


@pytest.mark.parametrize("end", ["told to stop", "lost"])
def test_a_server(several, tmp_path, end):
    port = free_port()
    with processes() as started:
        follower = Process(tmp_path, "follows", RUNNER, "serve", Q8, *several(port, 1))
        started.append(follower)
        with serving([str(RUNNER), "serve"], str(Q8), *map(str, several(port, 0)), JAX_PLATFORMS="cpu") as server:
            two = completions(server.wait_ready())
            follower.popen.send_signal(signal.SIGTERM)  # as launchers do; process 0 ends it
            assert completions(server) == two
            if end == "lost":
                follower.popen.kill()
                until(lambda: server.process.poll() is not None, server.log, 60)
                assert "ktx-jax: process 1 on 127.0.0.1 is gone" in "".join(server.log)
                assert server.process.returncode == 1
                return
        assert follower.popen.wait(PATIENCE) == 0, follower.errors()
        assert server.process.returncode == 0
    with serving([str(RUNNER), "serve"], str(Q8), JAX_PLATFORMS="cpu") as server:
        assert completions(server.wait_ready()) == two
