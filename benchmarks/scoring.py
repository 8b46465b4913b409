# SPDX-License-Identifier: Apache-2.0
"""Scoring beside raw prefill: the same texts, the same engine, one run. See README.md.

    python benchmarks/scoring.py MODEL [--implementation ffi] [--rounds 3]
    python benchmarks/scoring.py MODEL --peers peers/bin/python [--questions 16]

Raw prefill runs the texts' tokens through full prefill steps, the head on each sequence's last token only. Scoring
gives every token's log-probability (perplexity), or those of short continuations of shared contexts (multiple choice).

With --peers, an interpreter that has llama-cpp-python[server], a multiple-choice task of lm-evaluation-harness instead
(which needs `lm-eval[api]` here): by our model, and by `local-completions` over that server, one after another.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ktx_jax import LLM, SamplingParams
from ktx_jax.engine.branches import Window
from ktx_jax.tokenizer import Tokenizer

_TOKENS_A_WORD = 12  # more than most have, though six where a file has no real vocabulary


def sequences(llm: LLM, count: int, length: int, seed: int) -> np.ndarray:
    """Random token ids, [count, length], new to the prefix cache for each seed; speed does not depend on them."""
    return np.random.default_rng(seed).integers(0, llm.tokenizer.vocab_size, (count, length), np.int32)


def prefill(llm: LLM, rows: np.ndarray) -> int:
    """Answers every row with one token; the tokens computed."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    llm.generate([row.tolist() for row in rows], params)
    return rows.size


def every_token(llm: LLM, rows: np.ndarray) -> int:
    """Scores every token but the first of each row; the tokens computed, as many as in `prefill`."""
    llm.score_windows([Window(np.append(row, row[:1]), 1) for row in rows])
    return rows.size


def choices(llm: LLM, rows: np.ndarray) -> int:
    """Scores four continuations of 8 tokens after each row but its end; the tokens computed where nothing is shared."""
    heads = rows[:, :-8]
    rng = np.random.default_rng(1)
    windows = [
        Window(np.concatenate([head, rng.integers(0, llm.tokenizer.vocab_size, 8, np.int32)]), len(head))
        for head in heads
        for _ in range(4)
    ]
    llm.score_windows(windows)
    return sum(window.length for window in windows)


def rate(work: Callable[[LLM, np.ndarray], int], llm: LLM, rows: np.ndarray) -> float:
    """Tokens a second, once compiled."""
    begun = time.perf_counter()
    return work(llm, rows) / (time.perf_counter() - begun)


def against_llama(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of a task by each; a smaller one is run first by all, so that nothing is compiled or read meanwhile."""
    from parts import harness

    found: dict[str, harness.Answers] = {}
    context = _TOKENS_A_WORD * (options.length // 2 + harness.WORDS)
    tokenizer = Tokenizer.from_gguf(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        harness.write_task(folder, "warm", 1, options.length // 2)
        harness.write_task(folder, "choices", options.questions, options.length // 2)
        for how, repack in {"llama.cpp, repacked": True, "llama.cpp, not repacked": False}.items():
            log = folder / "server.log"
            with harness.llama_server(options.peers, options.model, context=context, repack=repack, log=log) as url:
                peer = harness.Peer(tokenizer, url, context)
                harness.evaluate(peer, folder, "warm")
                found[how] = harness.evaluate(peer, folder, "choices")
        llm = load(options, context)
        for task in ("warm", "choices"):  # the first compiles for one question only: so once more
            harness.evaluate(harness.ours(llm), folder, task)
        found["ktx-jax"] = harness.evaluate(harness.ours(llm), folder, "choices")
    ours = found["ktx-jax"]
    for how, one in found.items():
        apart = np.abs(one.logprobs - ours.logprobs).mean()
        print(f"{how:24} {one.seconds:8.2f} s   accuracy {one.accuracy:.2f}   {one.seconds / ours.seconds:6.2f} x ours"
              f"   log-probabilities apart by {apart:.3f} of {np.abs(ours.logprobs).mean():.1f} nats")  # fmt: skip
    return {how: {"seconds": one.seconds, "accuracy": one.accuracy} for how, one in found.items()}


def load(options: argparse.Namespace, context: int) -> LLM:
    return LLM(
        options.model, implementation=options.implementation, dtype=options.dtype, batch=options.batch,
        context=context, repack=not options.no_repack,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--implementation", help="xla or ffi [default: the fast one that runs]")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--batch", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--count", type=int, default=16, help="texts")
    parser.add_argument(
        "--length", type=int, default=256, help="tokens of each; with --peers, twice the words of a context"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take turns")
    parser.add_argument("--no-repack", action="store_true", help="read the mapped file as it is")
    parser.add_argument("--peers", metavar="PYTHON", help="compare with llama-cpp-python's server, by this interpreter")
    parser.add_argument("--questions", type=int, default=16, help="of four choices each, with --peers")
    options = parser.parse_args()
    if options.peers:
        print(json.dumps({"model": options.model.name, "task": against_llama(options)}))
        return
    llm = load(options, 2 * options.length)
    works = {"prefill": prefill, "every token": every_token, "choices": choices}
    for work in works.values():
        work(llm, sequences(llm, options.count, options.length, 0))
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(options.rounds):
        rows = sequences(llm, options.count, options.length, 1 + turn)
        for name in list(works)[:: -1 if turn % 2 else 1]:
            rates[name].append(rate(works[name], llm, rows))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:12} {value:10.1f} tokens/s   {value / medians['prefill']:6.2f} of prefill")
    machine = {"device": str(jax.devices()[0]), "implementation": llm.implementation, "dtype": options.dtype}
    print(json.dumps({"model": options.model.name, **machine, "rates": rates}))


if __name__ == "__main__":
    main()
