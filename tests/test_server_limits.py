# SPDX-License-Identifier: Apache-2.0
"""Who may use a server, how much they may ask, and what happens at the ends of connections and of the server."""

import base64
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from serving import FAKE, Server, serving, sse, until

from ktx_jax.errors import KtxError
from ktx_jax.resources import demo_model
from ktx_jax.server.settings import Settings

CHAT = "/v1/chat/completions"
MODEL = str(demo_model())


def chat(text, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def keyed():
    arguments = ["--api-key", "sesame-open", "--host", "0.0.0.0", "--cors-origin", "https://pages.example"]
    with serving(FAKE, MODEL, "--name", "tiny", *arguments) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        key = {"Authorization": "Bearer sesame-open"}
        until(lambda: server.ask("/ready", headers=key)[0] == 200, server.log)
        yield server


@pytest.fixture(scope="module")
def bounded():
    arguments = ["--max-body", "2000", "--max-connections", "4", "--timeout", "5", "--log-prompts"]
    with serving(FAKE, MODEL, "--name", "tiny", *arguments) as server:
        yield server.wait_ready()


def test_another_host_without_a_key_needs_a_word():
    with pytest.raises(KtxError, match="--open"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", open=True).open
    assert not Settings(host="0.0.0.0", api_key="x").local
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert Settings(host=host).local
    for wrong in ({"api_key": ""}, {"api_key": " a"}, {"api_key": "ä"}, {"tls_cert": Path("x")}):
        with pytest.raises(KtxError):
            Settings(**wrong)


def test_every_route_but_health_asks_for_the_key(keyed):
    paths = keyed.ask("/openapi.json", headers={"Authorization": "Bearer sesame-open"})[2]["paths"]
    assert len(paths) > 10
    for path, methods in {**paths, "/": {"get": {}}, "/openapi.json": {"get": {}}, "/nothing": {"get": {}}}.items():
        for method in methods:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Bearer "},
                {"Authorization": "Basic !"},
            ):
                status, got, reply = keyed.ask(path, method=method.upper(), headers=headers)
                assert status == (200 if path == "/health" else 401), path
                if status == 401:
                    assert got["WWW-Authenticate"].startswith("Basic")
                    assert reply["error"]


def test_the_key_opens(keyed):
    password = base64.b64encode(b"anyone:sesame-open").decode()
    for shown in ("Bearer sesame-open", "bearer sesame-open", f"Basic {password}"):
        headers = {"Authorization": shown}
        assert keyed.ask("/", headers=headers)[0] == 200
        assert keyed.ask(CHAT, chat("say x"), headers=headers)[0] == 200


def test_pages_from_elsewhere_are_kept_out(keyed):
    key = {"Authorization": "Bearer sesame-open"}
    status, headers, _ = keyed.ask(CHAT, chat("say x"), headers={**key, "Origin": "https://evil.example"})
    assert status == 403
    assert "Access-Control-Allow-Origin" not in headers
    assert keyed.ask(CHAT, method="OPTIONS", headers={"Origin": "https://evil.example"})[0] in (401, 403)
    own = {**key, "Origin": keyed.url}
    assert keyed.ask(CHAT, chat("say x"), headers=own)[0] == 200
    named = {**key, "Origin": "https://pages.example"}
    status, headers, _ = keyed.ask(CHAT, chat("say x"), headers=named)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://pages.example")
    preflight = {"Origin": "https://pages.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = keyed.ask(CHAT, method="OPTIONS", headers=preflight)
    assert status == 204
    assert "Authorization" in headers["Access-Control-Allow-Headers"]


def test_names_that_are_not_this_machine(bounded):
    port = urlsplit(bounded.url).port
    for host, status in ((f"rebound.example:{port}", 403), (f"localhost:{port}", 200), (f"[::1]:{port}", 200)):
        assert bounded.ask("/health", headers={"Host": host})[0] == status


def test_large_bodies(bounded):
    status, headers, reply = bounded.ask(CHAT, chat("x" * 5000))
    assert (status, reply["error"]["code"]) == (413, "body_too_large")
    assert headers["Connection"] == "close"
    connection = bounded.connect()
    connection.request(
        "POST", CHAT, iter([b"x" * 1000] * 5), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_too_many_connections(bounded):
    crowd = [socket.create_connection(_address(bounded)) for _ in range(4)]
    try:
        time.sleep(0.3)
        with socket.create_connection(_address(bounded), timeout=30) as late:
            answer = late.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
    finally:
        for one in crowd:
            one.close()
    until(lambda: bounded.ask("/health")[0] == 200)


def test_prompts_are_logged_only_if_asked(bounded, keyed):
    for server, headers, expected in ((bounded, {}, True), (keyed, {"Authorization": "Bearer sesame-open"}, False)):
        assert server.ask(CHAT, chat("say a-very-secret-word"), headers=headers)[0] == 200
        until(lambda server=server: CHAT in server.log[-1])
        assert any("secret-word" in line for line in server.log) == expected
    assert not any("sesame" in line for line in keyed.log)


def test_a_request_that_takes_too_long():
    with serving(FAKE, MODEL, "--name", "tiny", FAKE_RECEIVE_SECONDS="0.5") as server:
        server.wait_ready()
        for sent, code in ((b"POST /v1/chat/completions HTTP/1.1\r\nHo", "slow_head"), (b"", "slow_head")):
            with socket.create_connection(_address(server), timeout=30) as slow:
                slow.sendall(sent)
                answer = _everything(slow)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert code.encode() in answer
        with socket.create_connection(_address(server), timeout=30) as slow:
            slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            answer = _everything(slow)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"slow_body" in answer


def test_a_client_that_goes_frees_its_request(bounded):
    for more in ({"stream": True}, {}, {"stream": True, "n": 3}):
        connection = bounded.connect()
        connection.request("POST", CHAT, json.dumps(chat("endless", **more)))
        until(lambda count=more.get("n", 1): bounded.metric("ktx_batch_requests") == count)  # noqa: B008
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        begun = time.monotonic()
        until(lambda: bounded.metric("ktx_batch_requests") == 0)
        assert time.monotonic() - begun < 1.5


def test_comments_keep_an_idle_stream_alive():
    with serving(FAKE, MODEL, "--name", "tiny", FAKE_KEEPALIVE_SECONDS="0.3") as server:
        server.wait_ready()
        connection = server.connect()
        connection.request("POST", CHAT, json.dumps(chat("silent", stream=True)))
        response = connection.getresponse()
        lines = list(response)
        connection.close()
        assert lines.count(b": keep-alive\n") >= 3
        assert lines[-2:] == [b"data: [DONE]\n", b"\n"]


def test_while_the_model_loads():
    with serving(FAKE, MODEL, "--name", "tiny", FAKE_LOAD_SECONDS="3") as server:
        assert server.ask("/health")[2]["state"] == "loading"
        assert server.ask("/")[0] == 200
        for path, body in (("/ready", None), (CHAT, chat("say x")), ("/v1/models", None), ("/api/tags", None)):
            status, headers, reply = server.ask(path, body)
            assert status == 503, path
            assert int(headers["Retry-After"]) > 0
            assert "loading" in str(reply["error"])
        server.wait_ready()
        assert server.ask(CHAT, chat("say x"))[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server():
    with serving(FAKE, MODEL, FAKE_LOAD_FAILS="1") as server:
        assert server.process.wait(60) == 1
    assert "the model cannot be loaded" in server.log[-1]


def test_an_engine_that_fails_ends_the_server():
    with serving(FAKE, MODEL, "--name", "tiny") as server:
        server.wait_ready()
        assert server.ask(CHAT, chat("broken"))[0] == 503
        assert server.process.wait(60) == 1
    assert "a step failed" in server.log[-1]


@pytest.mark.parametrize(("grace", "whole"), [("30", True), ("0.5", False)])
def test_running_replies_end_before_the_server(grace, whole):
    with serving(FAKE, MODEL, "--name", "tiny", "--grace", grace) as server:
        server.wait_ready()
        came: list[str] = []
        connection = server.connect()
        connection.request("POST", CHAT, json.dumps(chat("slow", stream=True)))
        response = connection.getresponse()
        reader = threading.Thread(target=lambda: came.extend(sse(response)))
        reader.start()
        until(lambda: came)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: _refuses(server))
        reader.join(60)
        connection.close()
        assert server.process.wait(60) == 0
    last = came[-1] if whole else json.loads(came[-1])
    assert last == "[DONE]" if whole else last["error"]["code"] == "closing"


def test_tls(tmp_path):
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-out", files[0], "-keyout", files[1]],
        capture_output=True, check=False,
    ) if _has("openssl") else None  # fmt: skip
    if made is None or made.returncode:
        pytest.skip("no openssl command to make a certificate with")
    with serving(FAKE, MODEL, "--tls-cert", str(files[0]), "--tls-key", str(files[1])) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=files[0])
        with (
            socket.create_connection(_address(server), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert secure.recv(4096).startswith(b"HTTP/1.1 200 ")


def _has(program):
    return shutil.which(program) is not None


def _address(server: Server):
    parts = urlsplit(server.url)
    return parts.hostname, parts.port


def _refuses(server: Server) -> bool:
    try:
        socket.create_connection(_address(server), timeout=5).close()
    except OSError:
        return True
    return False


def _everything(connection) -> bytes:
    data = b""
    while more := connection.recv(4096):
        data += more
    return data
