# SPDX-License-Identifier: Apache-2.0
"""From a checked request to replies: what is asked of the engine, and what comes of it, in no API's form yet."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from ktx_jax.async_engine import EngineClosed
from ktx_jax.engine.reply import Chunk, StopTexts
from ktx_jax.engine.requests import SamplingParams, TokenLogprob
from ktx_jax.server.errors import ApiError
from ktx_jax.server.hosted import Hosted
from ktx_jax.server.metrics import Metrics
from ktx_jax.server.settings import Settings
from ktx_jax.server.tools import CallParser, MarkupDecoder, Part
from ktx_jax.tokenizer import Tokenizer

log = logging.getLogger("ktx_jax.server")


@dataclass(frozen=True)
class Ask:
    """One reply that is wanted.

    Attributes:
      prompt: token ids.
      params: how to draw.
      calls: look for calls of tools in the reply.
      parallel: let it call more than one.
    """

    prompt: list[int]
    params: SamplingParams
    calls: bool = False
    parallel: bool = True


@dataclass(frozen=True)
class Delta:
    """What a reply grew by.

    Attributes:
      parts: text and calls.
      logprobs: of the tokens that came, if asked for.
      finish: "stop", "length" or "tool_calls" at the end.
    """

    parts: tuple[Part, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


@dataclass
class Usage:
    """Tokens and seconds of an HTTP request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # by prompt: tokens that the prefix cache spared
    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when the first token came

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Answer:
    """Several replies at once, as they come.

    Args:
      hosted: whom to ask.
      asks: the replies wanted; their places here are their indices.
      prompt_tokens: of the prompts; one that several replies share counts once.
      settings: how long it may take, and whether it is logged.
      metrics: where to count.
    """

    def __init__(self, hosted: Hosted, asks: Sequence[Ask], prompt_tokens: int, settings: Settings, metrics: Metrics):
        self._hosted, self._loaded, self._asks, self._metrics = hosted, hosted.get(), asks, metrics
        self._settings = settings
        self.usage = Usage(prompt_tokens)
        metrics.prompt_tokens.inc(prompt_tokens)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Index and growth of the replies, until all have ended. Closing it cancels those that have not.

        Raises:
          KtxError: as `AsyncEngine.generate`.
          ApiError: 503, the server stops.
        """
        coming: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

        async def follow(index: int, ask: Ask) -> None:
            try:
                async with aclosing(self._reply(ask)) as deltas:
                    async for delta in deltas:
                        coming.put_nowait((index, delta))
                coming.put_nowait((index, None))
            except Exception as error:
                coming.put_nowait((index, error))

        tasks = [asyncio.create_task(follow(i, ask)) for i, ask in enumerate(self._asks)]
        try:
            live = len(tasks)
            while live:
                index, come = await coming.get()
                if come is None:
                    live -= 1
                elif isinstance(come, Exception):
                    if isinstance(come, EngineClosed) and come.__cause__ is not None:
                        self._hosted.fail(come)
                    raise come
                else:
                    yield index, come
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def empty(self) -> bool:
        """Whether nothing is to be generated."""
        return not self._asks

    async def _reply(self, ask: Ask) -> AsyncGenerator[Delta, None]:
        read = _CallReader(self._loaded.llm.tokenizer, ask) if ask.calls else _plain
        params = ask.params if not ask.calls else replace(ask.params, stop=())
        first = 0.0
        self._log("prompt", ask.prompt)
        said: list[int] = []
        left = self._settings.timeout - (time.perf_counter() - self.usage.begun)
        async with aclosing(self._loaded.engine.generate(ask.prompt, params, deadline=left)) as chunks:
            async for chunk in chunks:
                if chunk.token_ids and not said:
                    self.usage.cached.setdefault(id(ask.prompt), chunks.cached_tokens)
                    first = time.perf_counter()
                    self.usage.first = self.usage.first or first
                    self._metrics.first_token.observe(first - self.usage.begun)
                said += chunk.token_ids
                self.usage.completion_tokens += len(chunk.token_ids)
                self._metrics.generated_tokens.inc(len(chunk.token_ids))
                if chunk.finish_reason == "abort":
                    raise ApiError(503, "the server is stopping", code="closing", retry_after=10)
                delta = read(chunk)
                if delta.parts or delta.logprobs or delta.finish:
                    yield delta
                if delta.finish:
                    self._metrics.finished.labels(delta.finish).inc()
                    break
        self._log("reply", said)
        seconds = time.perf_counter() - first
        if len(said) > 1:
            self._metrics.speed.observe((len(said) - 1) / seconds)

    def _log(self, what: str, tokens: Sequence[int]) -> None:
        if self._settings.log_prompts:
            log.info("%s: %r", what, self._loaded.llm.tokenizer.decode(tokens, skip_special_tokens=False))


def _plain(chunk: Chunk) -> Delta:
    return Delta((chunk.text,) if chunk.text else (), chunk.logprobs, chunk.finish_reason)


class _CallReader:
    """Reads a reply that may hold calls. Stop texts end its text; they are not looked for in calls."""

    def __init__(self, tokenizer: Tokenizer, ask: Ask):
        self._decoder, self._parser = MarkupDecoder(tokenizer), CallParser()
        self._stops, self._parallel = StopTexts(tuple(ask.params.stop)), ask.parallel

    def __call__(self, chunk: Chunk) -> Delta:
        parts = self._parser.push("".join(map(self._decoder.push, chunk.token_ids)))
        if chunk.finish_reason is not None:
            parts += self._parser.push(self._decoder.flush()) + self._parser.flush()
        kept: list[Part] = []
        for part in parts:
            if isinstance(part, str):
                kept.append(self._stops.push(part))
            elif self._parallel or part.index == 0:
                kept += [self._stops.flush(), part]
            if self._stops.met:
                break
        finish: str | None = chunk.finish_reason
        if self._stops.met or (self._parser.ended and not self._parallel):
            finish = "stop"
        if finish is not None:
            kept.append(self._stops.flush())
        if finish == "stop" and self._parser.calls:
            finish = "tool_calls"
        return Delta(tuple(part for part in kept if part), chunk.logprobs, finish)
