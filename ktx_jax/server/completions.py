# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions`: texts gone on with, and prompts scored (`echo` with `logprobs`)."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ktx_jax.engine.requests import TokenLogprob
from ktx_jax.server.answer import Answer
from ktx_jax.server.chat import token_text
from ktx_jax.server.hosted import Loaded
from ktx_jax.server.stream import event
from ktx_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Echo:
    """A prompt given back: its text, and the score of each of its tokens if asked for (the first has none)."""

    text: str = ""
    scores: tuple[TokenLogprob | int, ...] = ()


async def echoes(loaded: Loaded, prompts: Sequence[list[int]], logprobs: int | None, timeout: float) -> list[Echo]:
    """The prompts given back, their tokens scored if log-probabilities are asked for.

    Raises:
      KtxError: as `AsyncEngine.score_prompt`.
    """
    texts = [loaded.llm.tokenizer.decode(prompt) for prompt in prompts]
    if logprobs is None:
        return [Echo(text) for text in texts]
    tasks = [
        asyncio.ensure_future(loaded.engine.score_prompt(prompt, logprobs, deadline=timeout)) for prompt in prompts
    ]
    try:
        scored = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return [
        Echo(text, tuple(token if score is None else score for token, score in zip(prompt, scores, strict=True)))
        for text, prompt, scores in zip(texts, prompts, scored, strict=True)
    ]


class Logprobs:
    """Log-probabilities in the form of completions; offsets are characters of the text so far."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._offset = tokenizer, 0

    def body(self, entries: Sequence[TokenLogprob | int]) -> dict[str, Any]:
        """Of the tokens that came; a token without a score is its id alone."""
        tokens: list[str] = []
        scores: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            token = entry if isinstance(entry, int) else entry.token_id
            tokens.append(token_text(self._tokenizer, token))
            offsets.append(self._offset)
            if token not in self._tokenizer.special_ids:
                self._offset += len(self._tokenizer.token_bytes(token).decode(errors="ignore"))
            scores.append(None if isinstance(entry, int) else entry.logprob)
            tops.append(None if isinstance(entry, int) else self._top(entry))
        return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that came: of two with the same text, the likelier."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(token_text(self._tokenizer, token), logprob)
        return top


@dataclass
class _Choice:
    text: str
    entries: list[TokenLogprob | int] = field(default_factory=list)
    finish: str | None = None


async def whole(
    model: str, answer: Answer, echoes: Sequence[Echo], tokenizer: Tokenizer, *, logprobs: bool
) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    choices = [_Choice(echo.text, list(echo.scores)) for echo in echoes]
    async with aclosing(answer.deltas()) as deltas:
        async for index, delta in deltas:
            choice = choices[index]
            choice.text += "".join(part for part in delta.parts if isinstance(part, str))
            choice.entries += delta.logprobs
            choice.finish = delta.finish or choice.finish
    listed = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": Logprobs(tokenizer).body(choice.entries) if logprobs else None,
            "finish_reason": choice.finish or "length",  # nothing was to be generated
        }
        for index, choice in enumerate(choices)
    ]
    return {**_head(model), "choices": listed, "usage": answer.usage.body()}


async def chunks(
    model: str, answer: Answer, echoes: Sequence[Echo], tokenizer: Tokenizer, *, logprobs: bool, usage: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: the echo first, if wanted, and each choice's finish reason last; then usage; then [DONE]."""
    head = _head(model) | ({"usage": None} if usage else {})
    scored = [Logprobs(tokenizer) for _ in echoes]

    def chunk(index: int, text: str, entries: Sequence[TokenLogprob | int], finish: str | None) -> bytes:
        said = scored[index].body(entries) if logprobs and entries else None
        return event({**head, "choices": [{"index": index, "text": text, "logprobs": said, "finish_reason": finish}]})

    for index, echo in enumerate(echoes):
        if echo.text or echo.scores:
            yield chunk(index, echo.text, echo.scores, "length" if answer.empty else None)
    async with aclosing(answer.deltas()) as deltas:
        async for index, delta in deltas:
            yield chunk(index, "".join(map(str, delta.parts)), delta.logprobs, delta.finish)
    if usage:
        yield event({**head, "choices": [], "usage": answer.usage.body()})
    yield event("[DONE]")


def _head(model: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": model,
    }  # fmt: skip
