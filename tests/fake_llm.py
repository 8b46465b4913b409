# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `LLM` that answers at once, for tests of the command line; also run as a program, for terminals.

python tests/fake_llm.py chat model.gguf      the command line over the stand-in
"""

import signal
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

from ktx_jax.engine.reply import Chunk
from ktx_jax.engine.requests import SamplingParams
from ktx_jax.errors import KtxError


class FakeLLM:
    """Repeats the prompt's last word; "endless" goes on until stopped, "interrupt" raises Ctrl-C by itself."""

    made: ClassVar[list["FakeLLM"]] = []

    def __init__(self, path, *, chat_template=None, progress=None, **options):
        self.path, self.options = path, options
        self.chat_template = chat_template or "{{ messages }}"
        self.implementation = "xla"
        self.load_seconds = 0.5
        self.tokenizer = SimpleNamespace(vocab_size=16, special_ids=frozenset((0,)))
        self.asked: list = []
        self.params: SamplingParams | None = None
        if progress is not None:
            progress(50, 100)
            progress(100, 100)
        FakeLLM.made.append(self)

    def stream(self, prompt, params):
        self.asked.append(prompt)
        self.params = params
        if isinstance(prompt, str) and "too long" in prompt:
            raise KtxError("the prompt has 9 tokens; the context holds 8")
        return self._reply(str(prompt[-1]) if isinstance(prompt, list) else prompt.split()[-1], params.max_tokens)

    def stream_chat(self, messages, params):
        reply = self.stream(messages[-1]["content"], params)
        self.asked[-1] = [dict(message) for message in messages]
        return reply

    def generate(self, prompts, params):
        self.asked += prompts
        return [
            SimpleNamespace(text=f" {p}!", token_ids=(1, 2), finish_reason="stop", prompt_tokens=1) for p in prompts
        ]

    def _reply(self, word, count):
        if word == "endless":
            while True:
                time.sleep(0.01)
                yield Chunk("on ", (2,))
        for i in range(count):
            if word == "interrupt" and i == 2:
                signal.raise_signal(signal.SIGINT)
            yield Chunk(f"{word} ", (i,), (), "length" if i == count - 1 else None)


def fake_config(path, override=None):
    if "missing" in str(path):
        raise KtxError(f"{path}: no such file")
    return SimpleNamespace(max_position_embeddings=1024)


if __name__ == "__main__":
    import ktx_jax.llm
    from ktx_jax.cli import main

    ktx_jax.llm.LLM = FakeLLM
    ktx_jax.llm.load_config = fake_config
    main(sys.argv[1:])
