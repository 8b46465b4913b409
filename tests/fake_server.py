# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax serve` over a stand-in for the model, which does what the prompt's last word says; run as a program.

python tests/fake_server.py MODEL --port 0      the real command line and server, no JAX computed

    say TEXT...    replies with the text after "say", a token at a time
    slow           ten words, one each 0.2 s
    silent         one word, after 2 s
    endless        a word each 10 ms, until stopped
    full, late, broken, crash    the engine's errors: at once, or after a word
"""

import asyncio
import os
import sys
import time
from functools import partial

import ktx_jax.async_engine
import ktx_jax.commands.serve
from ktx_jax.async_engine import DeadlineExceeded, EngineClosed, QueueFull, Stats
from ktx_jax.chat import encode_chat
from ktx_jax.engine.reply import Chunk, StopTexts
from ktx_jax.engine.requests import TokenLogprob
from ktx_jax.resources import demo_model
from ktx_jax.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


class FakeLLM:
    """A real vocabulary, and nothing behind it."""

    context, load_seconds = 4096, 0.0

    def __init__(self, template: str | None = TEMPLATE):
        self.path, self.chat_template = demo_model(), template
        self.tokenizer = Tokenizer.from_gguf(self.path)

    def encode(self, prompt):
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def encode_chat(self, messages, *, tools=None):
        return encode_chat(self.tokenizer, self.chat_template, messages, tools=tools)


class FakeStream:
    """A reply as it comes."""

    cached_tokens = 0

    def __init__(self, chunks):
        self._chunks = chunks

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self._chunks)

    async def aclose(self):
        await self._chunks.aclose()


class FakeEngine:
    """Counts what runs, as the real one does."""

    def __init__(self, llm, *, max_queue=256):
        self.llm, self.running, self.closing = llm, 0, None
        self.asked = []

    def warm_up(self):
        return 0

    def generate(self, prompt, params, *, deadline):
        self.asked.append(params)
        text = self.llm.tokenizer.decode(prompt)
        if text.endswith("full"):
            raise QueueFull(256, 7.0)
        if self.closing is not None:
            raise EngineClosed("the engine is shutting down")
        return FakeStream(self._reply(text, params))

    async def _reply(self, text, params):
        self.running += 1
        try:
            async for chunk in self._said(text, params):
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self.running -= 1

    async def _said(self, text, params):
        command = text.split()[-1] if "say " not in text else "say"
        if command == "say":
            for chunk in self._spelled(text.split("say ", 1)[1], params):
                await asyncio.sleep(0)
                yield chunk
            return
        if command == "silent":
            await asyncio.sleep(2)
        for i in range(10) if command == "slow" else range(10**6):
            await asyncio.sleep({"slow": 0.2, "endless": 0.01}.get(command, 0))
            if self.closing is not None and time.monotonic() > self.closing:
                yield Chunk("", (), (), "abort")
            ends = command == "silent" or (i == 9 and command == "slow")
            yield Chunk(f"w{i} ", (10 + i % 100,), (), "stop" if ends else None)
            if command == "late":
                raise DeadlineExceeded("the reply was not complete when its deadline came")
            if command == "crash":
                raise RuntimeError("secret detail")
            if command == "broken":
                raise EngineClosed("a step failed") from ValueError("why")

    def _spelled(self, text, params):
        tokenizer = self.llm.tokenizer
        decoder, stops = tokenizer.stream(), StopTexts(tuple(params.stop))
        ids = tokenizer.encode(text, add_special_tokens=False)
        for i, token in enumerate(ids):
            last = i == len(ids) - 1
            piece = stops.push(decoder.push(token)) + (stops.flush() if last else "")
            logprobs = () if params.logprobs is None else (TokenLogprob(token, -0.5, ((token, -0.5),)),)
            cut = i + 1 == params.max_tokens
            finish = "stop" if stops.met or last else "length" if cut else None
            yield Chunk(piece, (token,), logprobs, finish)
            if finish:
                return

    async def score_prompt(self, ids, top=0, *, deadline):
        return (None, *(TokenLogprob(token, -1.0, ((token, -1.0), (5, -2.0))[:top]) for token in ids[1:]))

    def stats(self):
        return Stats(self.running, 0, 8, 64, 64 - self.running, 0, 0, 0, 0, 0)

    async def close(self, grace=30.0):
        self.closing = time.monotonic() + grace
        while self.running:
            await asyncio.sleep(0.02)


def load_fake(options, progress):
    for i in range(10):
        time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")) / 10)
        progress(i + 1, 10)
    if os.environ.get("FAKE_LOAD_FAILS"):
        raise ktx_jax.commands.serve.KtxError("the model cannot be loaded")
    return FakeLLM()


if __name__ == "__main__":
    import ktx_jax.server.settings
    from ktx_jax.cli import main

    times = {
        "receive_timeout": os.environ.get("FAKE_RECEIVE_SECONDS"),
        "keepalive": os.environ.get("FAKE_KEEPALIVE_SECONDS"),
    }
    settings = partial(
        ktx_jax.server.settings.Settings, **{name: float(value) for name, value in times.items() if value}
    )
    ktx_jax.server.settings.Settings = settings

    ktx_jax.commands.serve.load_llm = load_fake
    ktx_jax.async_engine.AsyncEngine = FakeEngine
    main(sys.argv[1:])
