# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions`: replies in OpenAI's form, whole and in chunks."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ktx_jax.engine.requests import TokenLogprob
from ktx_jax.server.answer import Answer, Delta
from ktx_jax.server.stream import event
from ktx_jax.server.tools import CallArguments, CallStart
from ktx_jax.tokenizer import Tokenizer


@dataclass
class Reply:
    """One choice, as far as it has come."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    def add(self, delta: Delta, tokenizer: Tokenizer) -> None:
        """Grows by `delta`."""
        for part in delta.parts:
            if isinstance(part, str):
                self.text += part
            elif isinstance(part, CallStart):
                function = {"name": part.name, "arguments": ""}
                self.calls.append({"id": part.id, "type": "function", "function": function})
            else:
                self.calls[part.index]["function"]["arguments"] += part.text
        self.logprobs += token_logprobs(tokenizer, delta.logprobs)
        self.finish = delta.finish or self.finish


async def whole(answer: Answer, count: int, tokenizer: Tokenizer) -> list[Reply]:
    """All replies, complete."""
    replies = [Reply() for _ in range(count)]
    async with aclosing(answer.deltas()) as deltas:
        async for index, delta in deltas:
            replies[index].add(delta, tokenizer)
    return replies


def completion(model: str, answer: Answer, replies: Sequence[Reply], logprobs: bool) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": _content(reply), "refusal": None, **_calls(reply)},
            "logprobs": {"content": reply.logprobs, "refusal": None} if logprobs else None,
            "finish_reason": reply.finish,
        }
        for index, reply in enumerate(replies)
    ]
    return {**_head(model, "chat.completion"), "choices": choices, "usage": answer.usage.body()}


async def chunks(
    model: str, answer: Answer, count: int, tokenizer: Tokenizer, *, logprobs: bool, usage: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: each choice's role first, its finish reason last; then the usage, if wanted; then [DONE]."""
    head = _head(model, "chat.completion.chunk") | ({"usage": None} if usage else {})

    def chunk(index: int, delta: dict[str, Any], entries: list[dict[str, Any]], finish: str | None = None) -> bytes:
        said = {"content": entries, "refusal": None} if entries else None
        choice = {"index": index, "delta": delta, "logprobs": said, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    begun: set[int] = set()
    async with aclosing(answer.deltas()) as deltas:
        async for index, delta in deltas:
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, [])
            entries = token_logprobs(tokenizer, delta.logprobs) if logprobs else []
            for part in delta.parts:
                yield chunk(index, _part(part), entries)
                entries = []
            if entries:
                yield chunk(index, {"content": ""}, entries)
            if delta.finish is not None:
                yield chunk(index, {}, [], delta.finish)
    if usage:
        yield event({**head, "choices": [], "usage": answer.usage.body()})
    yield event("[DONE]")


def token_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities in the form of chats; end tokens, which are no part of the text, are left out."""
    return [
        {
            **_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in entry.top],
        }
        for entry in entries
        if entry.token_id not in tokenizer.eos_ids
    ]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is part of a character is shown by its bytes, as OpenAI does."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


def _part(part: str | CallStart | CallArguments) -> dict[str, Any]:
    if isinstance(part, str):
        return {"content": part}
    if isinstance(part, CallStart):
        begin = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
    else:
        begin = {"function": {"arguments": part.text}}
    return {"tool_calls": [{"index": part.index, **begin}]}


def _content(reply: Reply) -> str | None:
    return reply.text if reply.text or not reply.calls else None


def _calls(reply: Reply) -> dict[str, Any]:
    return {"tool_calls": reply.calls} if reply.calls else {}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
