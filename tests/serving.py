# SPDX-License-Identifier: Apache-2.0
"""Servers in processes of their own, and small clients, for tests."""

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
REAL = ["-m", "ktx_jax.cli", "serve"]
FAKE = [str(ROOT / "tests" / "fake_server.py"), "serve"]
START_SECONDS = 600.0  # to load and compile, on a busy machine


class Server:
    """A server process; `log` is what it has written."""

    def __init__(self, process: subprocess.Popen, url: str, log: list[str]):
        self.process, self.url, self.log = process, url, log

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout)

    def ask(self, path, body=None, *, method=None, headers=(), raw=None):
        """Status, headers and body (of JSON, its value) of one request."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers))
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers.get("content-type") == "application/json"
            return response.status, response.headers, json.loads(text) if is_json else text
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A figure without labels from /metrics."""
        [value] = re.findall(rf"^{name} (\S+)$", self.ask("/metrics")[2], re.MULTILINE)
        return float(value)

    def wait_ready(self) -> "Server":
        until(lambda: self.ask("/ready")[0] == 200, self.log)
        return self


def until(condition, why=(), seconds: float = START_SECONDS) -> None:
    """Waits until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "".join(why) or "it never came about"
        time.sleep(0.05)


@contextlib.contextmanager
def serving(command, *arguments, **environment) -> Iterator[Server]:
    """Runs a server on a free port until the block ends; it has to end cleanly then, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *command, *arguments, "--port", "0"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    lines: queue.Queue[str] = queue.Queue()
    log: list[str] = []

    def read() -> None:
        for line in process.stderr:
            log.append(line)
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while not (found := re.search(r"listening on (\S+)", line := lines.get(timeout=START_SECONDS))):
            assert line, "".join(log)
        yield Server(process, found[1], log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join(10)
            process.stderr.close()


def sse(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of server-sent events, read strictly: any line that the server has no reason to send is an error."""
    assert response.status == 200, response.read()
    assert response.headers["Content-Type"] == "text/event-stream"
    data = None
    for raw in response:
        line = raw.decode("utf-8", errors="strict")
        assert line.endswith("\n")
        assert "\r" not in line
        line = line[:-1]
        if line.startswith("data: "):
            assert data is None, "an event of several lines"
            data = line[len("data: ") :]
        elif line == "":
            if data is not None:
                yield data
            data = None
        else:
            assert line.startswith(": "), f"neither data nor a comment: {line!r}"
    assert data is None, "the last event has no end"


def streamed(server: Server, path: str, body: dict) -> list[dict]:
    """The chunks of a streamed reply, which has to end with [DONE]."""
    connection = server.connect()
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        *chunks, done = sse(connection.getresponse())
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]
    finally:
        connection.close()
