# SPDX-License-Identifier: Apache-2.0
"""The routes."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncGenerator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ktx_jax.errors import KtxError
from ktx_jax.server import chat, completions, prepare
from ktx_jax.server.answer import Answer
from ktx_jax.server.errors import ApiError, api_error, invalid
from ktx_jax.server.hosted import Hosted
from ktx_jax.server.metrics import CONTENT_TYPE, Metrics
from ktx_jax.server.ollama import ollama
from ktx_jax.server.schema import Body, ChatRequest, CompletionRequest, Detokenize, Sampling, Tokenize
from ktx_jax.server.settings import MAX_CHOICES, Settings
from ktx_jax.server.stream import COMMENT, ClientGone, Pieces, event, while_connected

PAGE = Path(__file__).parent / "static" / "index.html"
_CLOSED_REQUEST = 499  # nginx's number for a client that went; nobody receives it


def create_app(hosted: Hosted, settings: Settings, metrics: Metrics) -> FastAPI:
    """All routes, over one model."""
    app = FastAPI(
        title="ktx-jax", version=version("ktx-jax"), docs_url=None, redoc_url=None,
        responses=dict.fromkeys((400, 401, 403, 404, 408, 413, 429, 503), _ERROR),
    )  # fmt: skip
    _errors(app)
    _openai(app, hosted, settings, metrics)
    ollama(app, hosted, settings, metrics)
    _tokens(app, hosted)
    _operations(app, hosted, metrics)
    return app


_ERROR: dict[str, Any] = {
    "description": "An error, in OpenAI's form; under `/api`, in Ollama's.",
    "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
}


def _errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = invalid(error.errors(), error.body)
        elif isinstance(error, HTTPException):  # the framework's own: no such route or method
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return api_error(error).response(request.url.path)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLOSED_REQUEST)

    for kind in (RequestValidationError, HTTPException, ApiError, KtxError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientGone, gone)


def _openai(app: FastAPI, hosted: Hosted, settings: Settings, metrics: Metrics) -> None:
    def model() -> dict[str, Any]:
        context = hosted.get().llm.context
        return {
            "id": hosted.name, "object": "model", "created": hosted.created, "owned_by": "ktx-jax",
            "max_model_len": context,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name}")
    async def model_of(name: str) -> dict[str, Any]:
        """The model, by its name."""
        hosted.get(name)
        return model()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Replies to a conversation."""
        loaded = hosted.get(body.model)
        tokenizer = loaded.llm.tokenizer
        asks = await asyncio.to_thread(prepare.chat_asks, loaded.llm, body)
        answer = Answer(hosted, asks, len(asks[0].prompt), settings, metrics)
        if body.stream:
            pieces = chat.chunks(
                hosted.name, answer, len(asks), tokenizer, logprobs=bool(body.logprobs), usage=_wants_usage(body)
            )
            return await events(pieces, body, request, settings)
        replies = await while_connected(request.receive, chat.whole(answer, len(asks), tokenizer))
        return JSONResponse(chat.completion(hosted.name, answer, replies, bool(body.logprobs)), headers=ignored(body))

    @app.post("/v1/completions")
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        """Texts gone on with."""
        loaded = hosted.get(body.model)
        tokenizer, n = loaded.llm.tokenizer, body.n or 1
        if len(body.prompts()) * n > MAX_CHOICES:
            raise ApiError(400, f"prompts times n should be at most {MAX_CHOICES}", param="n")
        prompts, asks = await asyncio.to_thread(prepare.completion_asks, loaded.llm, body)
        logprobs = body.logprobs is not None
        echoes = [completions.Echo()] * (len(prompts) * n)
        if body.echo:
            scored = completions.echoes(loaded, prompts, body.logprobs, settings.timeout)
            echoes = [echo for echo in await while_connected(request.receive, scored) for _ in range(n)]
        answer = Answer(hosted, asks, sum(map(len, prompts)), settings, metrics)
        if body.stream:
            pieces = completions.chunks(
                hosted.name, answer, echoes, tokenizer, logprobs=logprobs, usage=_wants_usage(body)
            )
            return await events(pieces, body, request, settings)
        whole = completions.whole(hosted.name, answer, echoes, tokenizer, logprobs=logprobs)
        return JSONResponse(await while_connected(request.receive, whole), headers=ignored(body))


def _tokens(app: FastAPI, hosted: Hosted) -> None:
    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        """Token ids of a text or a conversation."""
        llm = hosted.get(body.model).llm
        tokens = await asyncio.to_thread(prepare.tokens, llm, body)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": llm.context}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What clients need who count tokens themselves, as vLLM tells it."""
        llm = hosted.get().llm
        ends = {"bos_token": llm.tokenizer.bos_id, "eos_token": llm.tokenizer.eos_id}
        named = {
            name: None if token is None else llm.tokenizer.token_bytes(token).decode() for name, token in ends.items()
        }
        return {**named, "chat_template": llm.chat_template}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        """The text of token ids."""
        tokenizer = hosted.get(body.model).llm.tokenizer
        if bad := [token for token in body.tokens if token >= tokenizer.vocab_size]:
            raise ApiError(400, f"token id {bad[0]} is outside the vocabulary", param="tokens")
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, body.skip_special_tokens)}


def _operations(app: FastAPI, hosted: Hosted, metrics: Metrics) -> None:
    page = PAGE.read_text(encoding="utf-8")
    policy = _content_policy(page)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server runs, and how far it has come. Needs no key."""
        return {"status": "ok", "state": hosted.state, "progress": round(hosted.progress, 3)}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """Whether requests are taken; 503 if not."""
        hosted.get()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Figures in Prometheus' text format."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def events(pieces: AsyncGenerator[bytes, None], body: Sampling, request: Request, settings: Settings) -> Response:
    """A response of server-sent events, once the first is there or the wait for it is long."""
    response = Pieces(
        pieces, media_type="text/event-stream", headers=ignored(body), keepalive=settings.keepalive, idle=COMMENT,
        failure=lambda error: event(api_error(error).body()),
    )  # fmt: skip
    await while_connected(request.receive, response.begin())
    return response


def ignored(body: Body) -> dict[str, str]:
    """The header that names the parameters that changed nothing."""
    names = body.ignored()
    return {"X-Ignored-Parameters": ", ".join(names)} if names else {}


def _wants_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _content_policy(page: str) -> str:
    """Lets the page run its own script and style and talk to this server, and nothing else."""
    kinds = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
            for code in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {kinds['script']}; style-src {kinds['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
