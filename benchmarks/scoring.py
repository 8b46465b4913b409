# SPDX-License-Identifier: Apache-2.0
"""Scoring beside raw prefill: the same texts, the same engine, one run. See README.md.

    python benchmarks/scoring.py MODEL [--implementation ffi] [--rounds 3]

Raw prefill runs the texts' tokens through full prefill steps, the head on each sequence's last token only. Scoring
gives every token's log-probability (perplexity), or those of short continuations of shared contexts (multiple choice).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from ktx_jax import LLM, SamplingParams
from ktx_jax.engine.branches import Window


def sequences(llm: LLM, count: int, length: int) -> np.ndarray:
    """Random token ids, [count, length]; speed does not depend on what they say."""
    return np.random.default_rng(0).integers(0, llm.tokenizer.vocab_size, (count, length), np.int32)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--implementation", help="xla or ffi [default: the fast one that runs]")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--batch", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--count", type=int, default=16, help="texts")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take turns")
    parser.add_argument("--no-repack", action="store_true", help="read the mapped file as it is")
    options = parser.parse_args()
    llm = LLM(
        options.model, implementation=options.implementation, dtype=options.dtype, batch=options.batch,
        context=2 * options.length, repack=not options.no_repack,
    )  # fmt: skip
    rows = sequences(llm, options.count, options.length)
    works = {"prefill": prefill, "every token": every_token, "choices": choices}
    for work in works.values():
        work(llm, rows)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(options.rounds):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            rates[name].append(rate(works[name], llm, rows))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:12} {value:10.1f} tokens/s   {value / medians['prefill']:6.2f} of prefill")
    machine = {"device": str(jax.devices()[0]), "implementation": llm.implementation, "dtype": options.dtype}
    print(json.dumps({"model": options.model.name, **machine, "rates": rates}))


if __name__ == "__main__":
    main()
