# SPDX-License-Identifier: Apache-2.0
"""The server with the embedded model: OpenAI's clients, scores, constrained replies, random requests."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import jsonschema
import ktx_ffi
import numpy as np
import pytest
from scipy.special import log_softmax
from serving import FAKE, REAL, ROOT, serving, streamed
from soak import requests, soak

from ktx_jax import LLM, load_config
from ktx_jax.resources import demo_model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CLIENT = ROOT / "tests" / "openai_client.py"
TEMPLATE = ROOT / "tests" / "tools_template.jinja"


@pytest.fixture(scope="module")
def server():
    arguments = ["--name", "tiny", "--context", "1024", "--batch", "4", "--chat-template", str(TEMPLATE)]
    with serving(REAL, str(demo_model()), *arguments) as server:
        yield server.wait_ready()


@pytest.mark.slow
def test_the_newest_client(server):
    pytest.importorskip("openai")
    _run_client(sys.executable, server.url)


@pytest.mark.slow
def test_a_client_of_2024(server, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "openai==1.44.1", "httpx<0.28"]
    if (done := subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)).returncode:
        pytest.skip(f"openai 1.44.1 could not be installed: {done.stderr[-200:]}")
    _run_client(python, server.url)


def _run_client(python, url):
    done = subprocess.run(
        [python, "-W", "error", CLIENT, url], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all as it should be" in done.stdout


@pytest.mark.slow
def test_scores_are_those_of_the_logits(server):
    llm = LLM(demo_model(), context=256, batch=1)
    text = "A list is a mutable sequence of items."
    ids = llm.encode(text)
    exact = log_softmax(llm.logits(ids).astype(np.float64), axis=-1)
    body = {"model": "tiny", "prompt": [ids, ids[:5]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    for choice, tokens in zip(server.ask(TEXT, body)[2]["choices"], (ids, ids[:5]), strict=True):
        scores, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert scores[0] is tops[0] is None
        expected = [exact[i - 1, token] for i, token in enumerate(tokens)][1:]
        np.testing.assert_allclose(scores[1 : len(tokens)], expected, atol=1e-3)
        for i, token in enumerate(tokens[1:], 1):
            likeliest = int(exact[i - 1].argmax()) == token
            assert (scores[i] == max(tops[i].values())) == likeliest  # to the bit: how lm-eval finds what is greedy
        assert len(scores) == len(tokens) + 1


@pytest.mark.slow
@pytest.mark.skipif(not ktx_ffi.available(), reason="equal to the bit only with the CPU kernels")
def test_streams_that_come_and_go():
    """`benchmarks/serving.py --soak` for a few seconds."""
    with serving(REAL, str(demo_model()), "--name", "tiny", "--context", "256", "--batch", "4") as server:
        bodies = requests("tiny", 24, load_config(demo_model()).vocab_size, 256)
        report = soak(server.wait_ready(), bodies, streams=64, seconds=15, every=1)
        assert report.wrong == []
        assert report.lost == 0
        assert min(report.fates[fate] for fate in ("complete", "left", "hung up")) > 20, report.fates
        assert report.grown < 50e6, report.memory


def closed(**properties):
    """A schema of objects with exactly these properties."""
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


SCHEMAS = [
    closed(a={"type": "boolean"}, b={"enum": ["x", "y", None]}),
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "minItems": 1, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"anyOf": [{"const": 1}, closed(é={"type": "null"})]},
]


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_constrained_reply_always_validates(server, schema):
    form = {
        "type": "json_schema",
        "json_schema": {
            "name": "it",
            "schema": {**schema, "additionalProperties": False} if "properties" in schema else schema,
        },
    }
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Answer in JSON."}], "response_format": form}
    body |= {"temperature": 1.5, "top_p": 1, "n": 8, "seed": 3, "max_tokens": 120}
    for choice in server.ask(CHAT, body)[2]["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    for chunk in streamed(server, CHAT, {**body, "n": 1, "logprobs": True}):
        assert chunk["choices"][0]["finish_reason"] in (None, "stop")


@pytest.mark.slow
def test_random_requests_never_break_the_server(tmp_path):
    """schemathesis, over the description that the server gives of itself: no status of 500 or more."""
    schemathesis = Path(sys.executable).parent / "schemathesis"
    if not schemathesis.exists():
        pytest.skip("schemathesis is not installed (extra dev)")
    with serving(FAKE, str(demo_model()), "--name", "tiny") as server:
        server.wait_ready()
        command = [
            schemathesis, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
            "--phases", "coverage,fuzzing", "--max-examples", "20", "--max-time", "30", "--workers", "1", "--seed", "1",
            "--request-timeout", "60", "--suppress-health-check", "all", "--generation-database", "none",
            "--no-shrink", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout
        assert server.ask("/ready")[0] == 200
        assert any(": 200 in" in line for line in server.log)
        assert not any(re.search(r": 5\d\d in", line) for line in server.log if "/ready" not in line)
