# SPDX-License-Identifier: Apache-2.0
"""Ollama's routes, over the same replies: `/api/chat`, `/api/generate`, `/api/tags`."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError

from ktx_jax.commands.inspect import describe
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.server import prepare
from ktx_jax.server.answer import Answer
from ktx_jax.server.chat import Reply, whole
from ktx_jax.server.errors import api_error, invalid
from ktx_jax.server.hosted import Hosted
from ktx_jax.server.metrics import Metrics
from ktx_jax.server.schema import Body, ChatRequest, CompletionRequest, Number, StopText
from ktx_jax.server.settings import MAX_MESSAGES, MAX_STOPS, MAX_TOOLS, Settings
from ktx_jax.server.stream import Pieces, line, while_connected

_FOR_HARDWARE = (
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep"),
    *("numa", "use_mmap", "use_mlock", "low_vram"),
)


class Options(Body):
    """How to draw; what concerns only Ollama's own machinery is taken and changes nothing."""

    harmless = frozenset(_FOR_HARDWARE)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    num_predict: Annotated[int, Field(ge=-2, lt=2**31)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    numa: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    low_vram: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The same in OpenAI's words. A negative `num_predict` means as much as fits."""
        renamed = {"repeat_penalty": "repetition_penalty"}
        given = self.model_dump(exclude_none=True, exclude=set(self.harmless) | {"num_predict"})
        return {renamed.get(name, name): value for name, value in given.items()}


class OllamaFunction(Body):
    name: str
    arguments: dict[str, Any]
    index: int | None = None


class OllamaCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """The same in OpenAI's words."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.role == "tool":
            plain["tool_call_id"] = self.tool_call_id or self.tool_name or ""
        if self.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": call.id or f"call_{place}_{i}",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments)},
                }
                for i, call in enumerate(self.tool_calls)
            ]
        return plain


class Common(Body):
    harmless = frozenset(("keep_alive",))
    model: str
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: str | Number | None = None
    think: Literal[False] | None = None

    def ignored(self) -> list[str]:
        return [*super().ignored(), *(f"options.{name}" for name in (self.options or Options()).ignored())]

    def predicted(self) -> int | None:
        """The most tokens to generate, or None for as many as fit."""
        wanted = self.options.num_predict if self.options else None
        return None if wanted is None or wanted < 0 else max(wanted, 1)

    def sampling(self) -> dict[str, Any]:
        return self.options.sampling() if self.options else {}

    def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> ChatRequest:
        """The request that OpenAI's route would get.

        Raises:
          ApiError: 400, a value that only the other form has a limit for.
        """
        request: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": self.predicted()}
        if self.format == "json":
            request["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "format", "schema": self.format}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            return ChatRequest.model_validate({**request, "tools": tools, **self.sampling()})
        except ValidationError as error:
            problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
            raise invalid(problems, request) from error


class OllamaChat(Common):
    """`/api/chat`."""

    messages: Annotated[list[OllamaMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None


class OllamaGenerate(Common):
    """`/api/generate`: as a chat of one message, or with `raw` the text itself."""

    prompt: Annotated[str, Field(min_length=1)]
    system: str | None = None
    raw: bool | None = None


def ollama(app: FastAPI, hosted: Hosted, settings: Settings, metrics: Metrics) -> None:
    """Adds the routes."""

    async def respond(
        body: Common, request: Request, asks: list[Any], shaped: Callable[[Reply], dict[str, Any]]
    ) -> Response:
        answer = Answer(hosted, asks, len(asks[0].prompt), settings, metrics)
        names = ", ".join(body.ignored())
        headers = {"X-Ignored-Parameters": names} if names else {}
        tokenizer = hosted.get().llm.tokenizer
        if body.stream is not False:
            response = Pieces(
                _lines(body.model, answer, tokenizer, shaped), media_type="application/x-ndjson", headers=headers,
                keepalive=settings.keepalive, idle=b"",
                failure=lambda error: line({"error": api_error(error).message}),
            )  # fmt: skip
            await while_connected(request.receive, response.begin())
            return response
        [reply] = await while_connected(request.receive, whole(answer, 1, tokenizer))
        return JSONResponse(_said(body.model, shaped(reply)) | _end(answer, reply.finish), headers=headers)

    @app.post("/api/chat")
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Replies to a conversation, as Ollama does."""
        loaded = hosted.get(body.model)
        messages = [message.plain(i) for i, message in enumerate(body.messages)]
        asks = await asyncio.to_thread(prepare.chat_asks, loaded.llm, body.chat(messages, body.tools))
        return await respond(body, request, asks, lambda reply: {"message": _message(reply)})

    @app.post("/api/generate")
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Answers a text, as Ollama does."""
        loaded = hosted.get(body.model)
        if body.raw:
            asks = await asyncio.to_thread(_raw, loaded.llm, body)
        else:
            system = [{"role": "system", "content": body.system}] if body.system else []
            chat = body.chat([*system, {"role": "user", "content": body.prompt}])
            asks = await asyncio.to_thread(prepare.chat_asks, loaded.llm, chat)
        return await respond(body, request, asks, lambda reply: {"response": reply.text})

    @app.get("/api/tags")
    async def tags() -> dict[str, Any]:
        """The one model, as Ollama lists its own."""
        about = await asyncio.to_thread(_about, hosted.get().llm.path)
        name = f"{hosted.name}:latest"
        return {"models": [{"name": name, "model": name, **about}]}


def _raw(llm: Any, body: OllamaGenerate) -> list[Any]:
    request = CompletionRequest.model_validate(
        {"model": body.model, "prompt": body.prompt, "max_tokens": body.predicted() or llm.context, **body.sampling()}
    )
    return prepare.completion_asks(llm, request)[1]


async def _lines(
    model: str, answer: Answer, tokenizer: Any, shaped: Callable[[Reply], dict[str, Any]]
) -> AsyncGenerator[bytes, None]:
    """A line of JSON for each piece of text; calls come whole, before the last line, as Ollama sends them."""
    reply = Reply()
    async with aclosing(answer.deltas()) as deltas:
        async for _, delta in deltas:
            said = "".join(part for part in delta.parts if isinstance(part, str))
            reply.add(delta, tokenizer)
            if said:
                yield line(_said(model, shaped(Reply(said))) | {"done": False})
    if reply.calls:
        yield line(_said(model, shaped(Reply(calls=reply.calls))) | {"done": False})
    yield line(_said(model, shaped(Reply())) | _end(answer, reply.finish))


def _said(model: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"), **content}


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.calls:
        message["tool_calls"] = [
            {"function": {"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])}}
            for call in reply.calls
        ]
    return message


def _arguments(text: str) -> dict[str, Any]:
    """Arguments as an object; what is none (a call that was cut) is kept under an empty name."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    return value if isinstance(value, dict) else {"": value}


def _end(answer: Answer, finish: str | None) -> dict[str, Any]:
    """What only the last line has; times in nanoseconds."""
    usage, now = answer.usage, time.perf_counter()
    first = usage.first or now
    return {
        "done": True,
        "done_reason": "stop" if finish == "tool_calls" else finish,
        "total_duration": round((now - usage.begun) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": round((first - usage.begun) * 1e9),
        "eval_count": usage.completion_tokens,
        "eval_duration": round((now - first) * 1e9),
    }


@lru_cache(maxsize=1)
def _about(path: Path) -> dict[str, Any]:
    """What `/api/tags` tells of a model; its digest is of the files' names, sizes and times, not of their contents."""
    with open_gguf(path) as file:
        described, files = describe(file), file.files
    states = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in files]
    modified = datetime.fromtimestamp(max(time_ns for _, _, time_ns in states) / 1e9, UTC)
    types = [name for name in described["types"] if name != "F32"]
    return {
        "modified_at": modified.isoformat().replace("+00:00", "Z"),
        "size": sum(size for _, size, _ in states),
        "digest": hashlib.sha256(repr(states).encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "deepseek2",
            "families": ["deepseek2"],
            "parameter_size": _short(described["parameters"]),
            "quantization_level": types[0] if types else "F32",
        },
    }


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
