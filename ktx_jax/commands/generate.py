# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax generate`: completes texts."""

import time
from collections.abc import Sequence
from typing import Any

from ktx_jax.commands.common import ModelOptions, Reply, load_llm, notes, print_json, receive, say

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


def generate(options: ModelOptions, prompts: Sequence[str], sampling: dict[str, Any], as_json: bool) -> int:
    """Completes `prompts`, one as it comes, several together; returns the exit code."""
    from ktx_jax.engine.requests import SamplingParams

    params = SamplingParams(**sampling)
    llm = load_llm(options)
    if len(prompts) > 1:
        return _together(llm, prompts, params, as_json)
    begun = time.perf_counter()
    reply = receive(llm.stream(prompts[0], params), (lambda text: None) if as_json else say, begun)
    if as_json:
        print_json(_described(prompts[0], reply))
    else:
        say("\n")
        notes.print(f"{reply.summary()}; {_ending(reply)}", style="dim")
    return INTERRUPTED if reply.stopped else 0


def _together(llm: Any, prompts: Sequence[str], params: Any, as_json: bool) -> int:
    begun = time.perf_counter()
    completions = llm.generate(list(prompts), params)
    seconds = time.perf_counter() - begun
    for prompt, completion in zip(prompts, completions, strict=True):
        if as_json:
            print_json(_described(prompt, completion))
        else:
            say(f"{prompt}{completion.text}\n\n")
    tokens = sum(len(completion.token_ids) for completion in completions)
    notes.print(f"{len(prompts)} texts, {tokens} tokens, {tokens / seconds:.1f} tokens/s", style="dim")
    return 0


def _described(prompt: str, reply: Any) -> dict[str, Any]:
    described = {
        "prompt": prompt,
        "text": reply.text,
        "token_ids": list(reply.token_ids),
        "finish_reason": reply.finish_reason,
    }
    if isinstance(reply, Reply):
        described |= {"first_token_s": reply.first_token_s, "decode_tok_s": reply.decode_tok_s}
    return described


def _ending(reply: Reply) -> str:
    return {"stop": "the model ended it", "length": "cut at --max-tokens or the context"}.get(
        reply.finish_reason or "", "stopped"
    )
