# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax demo`: the embedded model completes two texts and answers a question."""

import time
from collections.abc import Callable
from typing import Any

from ktx_jax.commands.common import ModelOptions, load_llm, notes, receive, say
from ktx_jax.commands.generate import INTERRUPTED
from ktx_jax.resources import demo_model

PROMPTS = ("The `try` statement", "Return a list of")
QUESTION = "What does textwrap.dedent do?"
NEXT = """\
Next:
  ktx-jax chat {model}
  ktx-jax inspect {model}
  ktx-jax generate DIRECTORY-OR-FILE.gguf -p "Once upon a time"    your own DeepSeek-V2 model
  ktx-jax synth --shape v2-lite --quant q4_k_m OUT.gguf           a model of true shapes for speed, without a download
  ktx-jax --help"""


def demo(cpu_threads: int | None) -> int:
    """Runs the demonstration; returns the exit code."""
    from ktx_jax.engine.requests import SamplingParams

    path = demo_model()
    notes.print(f"Loading {path.name}, a tiny DeepSeek-V2 trained on Python's documentation ...", style="dim")
    llm = load_llm(ModelOptions(path, context=512, cpu_threads=cpu_threads))
    notes.print(f"loaded in {llm.load_seconds:.1f} s; the first reply waits for compilation", style="dim")
    params = SamplingParams(max_tokens=64, seed=0)
    for prompt in PROMPTS:
        if not _show(prompt, lambda prompt=prompt: llm.stream(prompt, params)):
            return INTERRUPTED
    messages = [{"role": "user", "content": QUESTION}]
    if not _show(f"{QUESTION}\n", lambda: llm.stream_chat(messages, params)):
        return INTERRUPTED
    notes.print("\n" + NEXT.format(model=path), markup=False)
    return 0


def _show(opening: str, ask: Callable[[], Any]) -> bool:
    """Prints `opening` and the reply after it; whether it was let run to its end."""
    notes.print()
    say(opening)
    reply = receive(ask(), say, time.perf_counter())
    say("\n")
    notes.print(reply.summary(), style="dim")
    return not reply.stopped
