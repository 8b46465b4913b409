# SPDX-License-Identifier: Apache-2.0
"""Asks a server through OpenAI's own client, whatever its version is; run as a program where that client is installed.

python tests/openai_client.py URL       exits with an error at the first answer that is not as it should be
"""

import asyncio
import json
import sys

import openai

QUESTION = [{"role": "user", "content": "What is a list in Python?"}]
GREEDY = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["list", "tuple"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "kind", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a place",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"enum": ["Paris", "Rome"]},
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "history")
]


def valid(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"kind", "size"} and value["kind"] in ("list", "tuple") and 0 <= value["size"] <= 99


def check_call(name: str, arguments: str) -> None:
    assert name in ("weather", "history")
    value = json.loads(arguments)
    assert set(value) == {"place", "days"}
    assert value["place"] in ("Paris", "Rome")
    assert isinstance(value["days"], int)
    assert value["days"] <= 9


def sync(client: openai.OpenAI) -> str:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    reply = client.chat.completions.create(**GREEDY)
    text = reply.choices[0].message.content
    assert text
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 24
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-2].choices[0].finish_reason == reply.choices[0].finish_reason
    assert chunks[-1].usage == reply.usage
    scored = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    entries = scored.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == scored.choices[0].message.content == text
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in entries)
    several = client.chat.completions.create(**{**GREEDY, "temperature": 1}, n=3, seed=7)
    again = client.chat.completions.create(**{**GREEDY, "temperature": 1}, n=3, seed=7)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert valid(client.chat.completions.create(**GREEDY, response_format=FORMAT).choices[0].message.content)
    anything = client.chat.completions.create(**{**GREEDY, "max_tokens": 200}, response_format={"type": "json_object"})
    if anything.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(anything.choices[0].message.content), dict)
    tools(client)
    legacy(client, text)
    errors(client)
    return text


def tools(client: openai.OpenAI) -> None:
    asked = {**GREEDY, "max_tokens": 200, "tools": TOOLS}
    reply = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
    [call] = reply.choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert reply.choices[0].finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "history"}}
    names, arguments, finish = [], "", None
    for chunk in client.chat.completions.create(**asked, tool_choice=named, parallel_tool_calls=False, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            names += [part.function.name] if part.function.name else []
            arguments += part.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert names == ["history"]
    check_call("history", arguments)
    assert finish == "tool_calls"
    said = reply.choices[0].message.model_dump()
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    after = client.chat.completions.create(**{**GREEDY, "messages": [*QUESTION, said, result]}, tools=TOOLS)
    assert after.choices[0].message.content is not None
    free = client.chat.completions.create(**GREEDY, tools=TOOLS, tool_choice="none")
    assert not free.choices[0].message.tool_calls


def legacy(client: openai.OpenAI, text: str) -> None:
    completion = client.completions.create(
        model="tiny", prompt="A list is", max_tokens=8, temperature=0, echo=True, logprobs=2
    )
    [choice] = completion.choices
    assert choice.text.startswith("A list is")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == completion.usage.total_tokens
    streamed = client.completions.create(model="tiny", prompt="A list is", max_tokens=8, temperature=0, stream=True)
    assert "A list is" + "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def errors(client: openai.OpenAI) -> None:
    wrong = [
        (openai.NotFoundError, {**GREEDY, "model": "other"}),
        (openai.BadRequestError, {**GREEDY, "temperature": 9}),
        (openai.BadRequestError, {**GREEDY, "extra_body": {"nonsense": 1}}),
    ]
    for kind, request in wrong:
        try:
            client.chat.completions.create(**request)
            body = None
        except kind as error:
            body = error.body
        assert body, f"no {kind.__name__}"
        assert body["message"]


async def asynchronous(client: openai.AsyncOpenAI, text: str) -> None:
    whole, parts = await asyncio.gather(client.chat.completions.create(**GREEDY), _stream(client))
    assert whole.choices[0].message.content == parts == text
    formatted = await client.chat.completions.create(**GREEDY, response_format=FORMAT)
    assert valid(formatted.choices[0].message.content)


async def _stream(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(**GREEDY, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def main(url: str, key: str = "none") -> None:
    options = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0, "timeout": 300}
    with openai.OpenAI(**options) as client:
        text = sync(client)

    async def run() -> None:
        async with openai.AsyncOpenAI(**options) as client:
            await asynchronous(client, text)

    asyncio.run(run())
    print(f"openai {openai.__version__}: all as it should be")


if __name__ == "__main__":
    main(*sys.argv[1:])
