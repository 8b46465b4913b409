# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax bench`: how fast a model loads, compiles, reads a prompt and writes."""

import sys
import time
from typing import Any

import numpy as np

from ktx_jax.commands.common import ModelOptions, load_llm, print_json, receive
from ktx_jax.errors import KtxError


def bench(options: ModelOptions, prompt: int, decode: int, as_json: bool) -> int:
    """Measures and prints; returns the exit code.

    A prompt of random tokens is answered twice, by `decode` tokens each time. The second run is the speed; how much
    longer the first took is the time that compilation costs.
    """
    llm = load_llm(options)
    first, _, _ = _run(llm, prompt, decode, seed=0)
    again, to_first, between = _run(llm, prompt, decode, seed=1)
    result = {
        "model": str(options.model),
        "prompt": prompt,
        "decode": decode,
        "dtype": options.dtype,
        "implementation": llm.implementation,
        "load_s": round(llm.load_seconds, 3),
        "compile_s": round(max(first - again, 0.0), 3),
        "prefill_tok_s": round(prompt / to_first, 2),
        "decode_tok_s": round((decode - 1) / between, 2),
        "peak_rss_bytes": _peak_rss(),
    }
    if as_json:
        print_json(result)
    else:
        for key, value in result.items():
            print(f"{key:16} {value}")
    return 0


def _run(llm: Any, prompt: int, decode: int, seed: int) -> tuple[float, float, float]:
    """Seconds of a whole reply, to its first token, and from there to its last."""
    from ktx_jax.engine.requests import SamplingParams

    vocabulary = np.array(sorted(set(range(llm.tokenizer.vocab_size)) - llm.tokenizer.special_ids))
    tokens = np.random.default_rng(seed).choice(vocabulary, prompt).tolist()
    params = SamplingParams(max_tokens=decode, temperature=0.0, ignore_eos=True)
    times = []
    begun = time.perf_counter()
    reply = receive(llm.stream(tokens, params), lambda text: times.append(time.perf_counter()), begun)
    if reply.stopped:
        raise KeyboardInterrupt
    if len(times) < decode:
        raise KtxError(f"only {len(times)} of {decode} tokens fit: raise --context, or lower --prompt or --decode")
    return times[-1] - begun, times[0] - begun, times[-1] - times[0]


def _peak_rss() -> int:
    """The most memory this process has had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
