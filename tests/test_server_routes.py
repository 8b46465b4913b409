# SPDX-License-Identifier: Apache-2.0
"""The server's routes, over a stand-in for the model: forms of replies and errors, what is refused, what is ignored."""

import json

import pytest
from serving import FAKE, serving, sse, streamed

from ktx_jax.resources import demo_model
from ktx_jax.server import tools

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CALL = (
    f'{tools.BEGIN}{tools.CALL}function{tools.SEPARATOR}weather\n```json\n{{"city": "Paris"}}\n```{tools.CALL_END}\n'
    f"{tools.CALL}function{tools.SEPARATOR}clock\n```json\n{{}}\n```{tools.CALL_END}{tools.END}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "clock")
]


@pytest.fixture(scope="module")
def server():
    with serving(FAKE, str(demo_model()), "--name", "tiny") as server:
        yield server.wait_ready()


def chat(text, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def test_a_whole_reply(server):
    status, headers, reply = server.ask(CHAT, chat("say Hello, world"))
    assert status == 200
    assert "X-Ignored-Parameters" not in headers
    assert headers["X-Request-Id"]
    assert reply["object"] == "chat.completion"
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] > 1


def test_a_stream_by_the_letter(server):
    text = "say naïve 🙂 日本語 — done"
    chunks = streamed(server, CHAT, chat(text, n=2))
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        content = "".join(choice["delta"].get("content", "") for choice in mine)
        assert content == text.removeprefix("say ")
        assert not any("\ufffd" in choice["delta"].get("content", "") for choice in mine)  # no character was split
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1]["delta"] == {}


def test_usage_comes_last_and_only_if_asked_for(server):
    chunks = streamed(server, CHAT, chat("say a b", stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_the_true_finish_reason(server):
    reply = server.ask(CHAT, chat("say one two three four", max_tokens=2))[2]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert (
        streamed(server, CHAT, chat("say one two three four", max_tokens=2))[-1]["choices"][0]["finish_reason"]
        == "length"
    )
    reply = server.ask(CHAT, chat("say one two three four", stop=["three"]))[2]
    assert reply["choices"][0]["message"]["content"] == "one two "
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_of_chats(server):
    reply = server.ask(CHAT, chat("say é!", logprobs=True, top_logprobs=1))[2]
    entries = reply["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == "é!"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 1 for entry in entries)
    chunks = streamed(server, CHAT, chat("say é!", logprobs=True))
    spread = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["bytes"] for entry in spread] == [entry["bytes"] for entry in entries]


def test_calls_of_tools(server):
    [choice] = server.ask(CHAT, chat("say Wait. " + CALL, tools=TOOLS))[2]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait. "
    weather, clock = choice["message"]["tool_calls"]
    assert weather["type"] == "function"
    assert weather["function"]["name"] == "weather"
    assert json.loads(weather["function"]["arguments"]) == {"city": "Paris"}
    assert json.loads(clock["function"]["arguments"]) == {}
    assert weather["id"] != clock["id"]


def test_calls_of_tools_streamed(server):
    chunks = streamed(server, CHAT, chat("say " + CALL, tools=TOOLS))
    deltas = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", [])]
    begun = [call for call in deltas if "id" in call]
    assert [(call["index"], call["function"]["name"], call["type"]) for call in begun] == [
        (0, "weather", "function"),
        (1, "clock", "function"),
    ]
    arguments = ["".join(c["function"]["arguments"] for c in deltas if c["index"] == i) for i in range(2)]
    assert [json.loads(text) for text in arguments] == [{"city": "Paris"}, {}]
    assert len([c for c in deltas if c["index"] == 0]) > 2  # they come as they are written
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_only_if_asked(server):
    [choice] = server.ask(CHAT, chat("say " + CALL, tools=TOOLS, parallel_tool_calls=False))[2]["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
    assert choice["message"]["content"] is None


def test_markup_is_text_where_there_are_no_tools(server):
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        [choice] = server.ask(CHAT, chat("say " + CALL, **more))[2]["choices"]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


def test_completions(server):
    body = {"model": "tiny", "prompt": ["say one two", "say three"], "n": 2, "max_tokens": 99}
    reply = server.ask(TEXT, body)[2]
    assert reply["object"] == "text_completion"
    assert [c["text"] for c in reply["choices"]] == ["one two", "one two", "three", "three"]
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    chunks = streamed(server, TEXT, body)
    for index, text in enumerate(["one two", "one two", "three", "three"]):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert mine[-1]["finish_reason"] == "stop"


def test_prompts_scored(server):
    prompts = [server.ask("/tokenize", {"prompt": text})[2]["tokens"] for text in ("say hello there", "say hi")]
    body = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1}
    for reply in (server.ask(TEXT, body)[2]["choices"], None):
        choices = reply or _joined(streamed(server, TEXT, body))
        for choice, count in zip(choices, map(len, prompts), strict=True):
            scores = choice["logprobs"]
            assert scores["token_logprobs"] == [None] + [-1.0] * (count - 1) + scores["token_logprobs"][count:]
            assert scores["top_logprobs"][0] is None
            assert len(scores["tokens"]) == len(scores["text_offset"]) == count + 1
            assert all(max(top.values()) == -1.0 for top in scores["top_logprobs"][1:count])


def _joined(chunks):
    whole = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        mine = whole.setdefault(choice["index"], {"logprobs": {}})
        for name, values in (choice["logprobs"] or {}).items():
            mine["logprobs"][name] = mine["logprobs"].get(name, []) + values
    return [whole[index] for index in sorted(whole)]


def test_scoring_alone(server):
    body = {"model": "tiny", "prompt": "say hello", "echo": True, "logprobs": 0, "max_tokens": 0}
    [choice] = server.ask(TEXT, body)[2]["choices"]
    assert choice["text"] == "say hello"
    assert choice["logprobs"]["token_logprobs"][0] is None
    offsets = choice["logprobs"]["text_offset"]
    for token, at in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert choice["text"].startswith(token, at) or token.startswith("<｜")
    chunks = streamed(server, TEXT, body)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == ["length"]


def test_tokens_there_and_back(server):
    ids = server.ask("/tokenize", {"prompt": "naïve 🙂"})[2]
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 4096
    plain = server.ask("/tokenize", {"prompt": "naïve 🙂", "add_special_tokens": False})[2]["tokens"]
    assert server.ask("/detokenize", {"tokens": plain})[2] == {"prompt": "naïve 🙂"}
    assert ids["tokens"][1:] == plain
    about = server.ask("/tokenizer_info")[2]
    assert (
        server.ask("/tokenize", {"prompt": about["bos_token"], "add_special_tokens": False})[2]["tokens"]
        == ids["tokens"][:1]
    )
    said = server.ask("/tokenize", {"messages": [{"role": "user", "content": "naïve 🙂"}]})[2]["tokens"]
    assert said == plain


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "model"),
        (chat("x", frequency=1), "frequency"),
        (chat("x", temperature=3), "temperature"),
        (chat("x", temperature="1"), "temperature"),
        (chat("x", top_p=0), "top_p"),
        (chat("x", n=0), "n"),
        (chat("x", n=1000), "n"),
        (chat("x", stop=["a"] * 100), "stop"),
        (chat("x", stop=[""]), "stop.0"),
        (chat("x", top_logprobs=2), "top_logprobs"),
        (chat("x", logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat("x", stream_options={"include_usage": True}), "stream_options"),
        (chat("x", logit_bias={"99999": 1}), "logit_bias"),
        (chat("x", logit_bias={"a": 1}), "logit_bias"),
        (chat("x", stop_token_ids=[5000]), "stop_token_ids"),
        (chat("x", functions=[]), "functions"),
        (chat("x", response_format={"type": "xml"}), "response_format"),
        (chat("x", response_format={"type": "json_schema", "json_schema": {"name": "a"}}), SCHEMA),
        (chat("x", response_format=schema({"type": 5})), SCHEMA),
        (chat("x", response_format=schema({"enum": ["x" * 70000]})), SCHEMA),
        (chat("x", tool_choice="required"), "tool_choice"),
        (chat("x", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "none"}}), "tool_choice"),
        (chat("x", tools=[TOOLS[0], TOOLS[0]]), "tools"),
        (chat("x", tools=[{"type": "function", "function": {"name": "a b"}}]), "tools.0.function.name"),
        (chat("word " * 5000), "messages"),
        ({"model": "tiny", "messages": []}, "messages"),
        ({"model": "tiny", "messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"model": "tiny", "messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        ({"model": "tiny", "messages": [{"role": "assistant"}]}, "messages.0.content"),
        ({"model": "tiny", "messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ],
)  # fmt: skip
def test_wrong_chats_name_the_field(server, body, param):
    status, _, reply = server.ask(CHAT, body)
    assert status == 400
    assert reply["error"]["param"] == param
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "tiny"}, "prompt"),
        ({"model": "tiny", "prompt": []}, "prompt"),
        ({"model": "tiny", "prompt": [[]]}, "prompt.0"),
        ({"model": "tiny", "prompt": [[1, "x"]]}, "prompt.0.1"),
        ({"model": "tiny", "prompt": [1920]}, "prompt"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"model": "tiny", "prompt": "x", "best_of": 3}, "best_of"),
        ({"model": "tiny", "prompt": "x", "suffix": "y"}, "suffix"),
        ({"model": "tiny", "prompt": ["x"] * 100, "n": 2}, "n"),
        ({"model": "tiny", "prompt": "word " * 5000}, "prompt"),
    ],
)
def test_wrong_completions_name_the_field(server, body, param):
    status, _, reply = server.ask(TEXT, body)
    assert (status, reply["error"]["param"]) == (400, param)


def test_what_is_harmless_is_listed(server):
    status, headers, _ = server.ask(CHAT, chat("say x", user="me", store=False, metadata={"a": "b"}, service_tier=None))
    assert status == 200
    assert headers["X-Ignored-Parameters"] == "metadata, store, user"


def test_messages_that_clients_send_back(server):
    reply = server.ask(CHAT, chat("say x"))[2]["choices"][0]["message"]
    turns = [
        {"role": "user", "content": "a "},
        {**reply, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "say y"}]},
    ]
    assert server.ask(CHAT, {"model": "tiny", "messages": turns})[2]["choices"][0]["message"]["content"] == "y"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {**chat("x"), "model": "other"}, 404),
        ("/v1/models/other", None, 404),
        ("/v1/nothing", None, 404),
        ("/v1/embeddings", {"model": "tiny", "input": "x"}, 404),
        ("/v1/models", {}, 405),
        (CHAT, chat("full"), 429),
        (CHAT, chat("crash"), 500),
    ],
)
def test_errors_have_their_status(server, path, body, status):
    got, headers, reply = server.ask(path, body)
    assert got == status
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in reply["error"]["message"]
    if status == 429:
        assert headers["Retry-After"] == "7"


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b'{"model": NaN}', b"null", b"[" * 100000])
def test_bodies_that_are_no_requests(server, raw):
    for path in (CHAT, TEXT, "/tokenize", "/api/chat"):
        assert server.ask(path, raw=raw)[0] == 400


def test_errors_within_a_stream(server):
    for word, code in (("late", "timeout"), ("crash", "internal_error")):
        connection = server.connect()
        connection.request("POST", CHAT, json.dumps(chat(word, stream=True)))
        *chunks, last = map(json.loads, sse(connection.getresponse()))
        connection.close()
        assert chunks
        assert last["error"]["code"] == code
        assert "secret" not in last["error"]["message"]
    assert server.ask(CHAT, chat("late"))[0] == 408


def test_the_model_is_listed(server):
    [model] = server.ask("/v1/models")[2]["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 4096)
    assert server.ask("/v1/models/tiny")[2] == model


def test_figures(server):
    server.ask(CHAT, chat("say some words"))
    text = server.ask("/metrics")[2]
    names = [
        "queue_requests",
        "batch_requests",
        "pages_free",
        "prefix_hit_tokens_total",
        "time_to_first_token_seconds_count",
    ]
    names += ["tokens_per_second_count", "generated_tokens_total"]
    for name in names:
        assert f"\nktx_{name} " in text
    assert server.metric("ktx_generated_tokens_total") > 0
    assert server.metric("ktx_ready") == 1


def test_ollama(server):
    body = {
        "model": "tiny:latest",
        "messages": [{"role": "user", "content": "say hi there"}],
        "options": {"num_ctx": 9},
    }
    status, headers, text = server.ask("/api/chat", body)
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200
    assert headers["Content-Type"] == "application/x-ndjson"
    assert headers["X-Ignored-Parameters"] == "options.num_ctx"
    assert "".join(line["message"]["content"] for line in lines) == "hi there"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == "stop"
    assert lines[-1]["eval_count"] > 0
    whole = server.ask("/api/generate", {"model": "tiny", "prompt": "say hi there", "stream": False})[2]
    assert (whole["response"], whole["done"]) == ("hi there", True)
    raw = server.ask(
        "/api/generate",
        {"model": "tiny", "prompt": "say hi", "raw": True, "stream": False, "options": {"num_predict": 1}},
    )
    assert raw[2]["done_reason"] in ("length", "stop")
    [model] = server.ask("/api/tags")[2]["models"]
    assert (model["name"], model["details"]["format"]) == ("tiny:latest", "gguf")


def test_ollama_calls_and_errors(server):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "say " + CALL}], "tools": TOOLS, "stream": False}
    calls = server.ask("/api/chat", body)[2]["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": {"city": "Paris"}},
        {"name": "clock", "arguments": {}},
    ]
    status, _, reply = server.ask("/api/chat", {**body, "options": {"mirostat": 1}})
    assert status == 400
    assert "options.mirostat" in reply["error"]
    assert server.ask("/api/chat", {**body, "model": "other"})[0] == 404
    assert server.ask("/api/chat", {**body, "tools": [{"type": "function"}]})[0] == 400


def test_the_page_asks_nothing_of_others(server):
    status, headers, page = server.ask("/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert not [word for word in page.split() if "//" in word and "w3.org" not in word and word != "//"]
