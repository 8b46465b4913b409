# SPDX-License-Identifier: Apache-2.0
"""Every program that requests can need, compiled before the first one comes."""

from typing import Any

import numpy as np

from ktx_jax.engine.edits import edit_lengths, no_edits
from ktx_jax.engine.requests import MAX_BIASES, most_logprobs
from ktx_jax.engine.sampling import Draw, logprobs_of, sample_apart
from ktx_jax.engine.scheduler import Limits, Work
from ktx_jax.engine.stage import Kind
from ktx_jax.engine.step import Steps, make_draw, next_tokens, padding, whole_logits


def prepare_all(steps: Steps, limits: Limits, vocab_size: int) -> int:
    """Compiles the steps of every length, that draw or give logits, and what draws from logits apart from them.

    Scoring (`Engine.score`) has steps of its own.

    Returns:
      How many programs there are; a step counts as one.
    """
    count, top = 0, most_logprobs(vocab_size)
    kinds: list[Kind] = ["prefill", "decode"]
    if limits.stream_above is not None:
        kinds.append("stream")
    drawn_apart = set()
    for kind in kinds:
        decode = kind == "decode"
        for length in limits.ladder(decode=decode):
            rows = length if decode else limits.batch
            run, last = padding(limits, length, rows, 1 if decode else limits.tile)
            draw = make_draw(Work((), decode=decode), limits.shards, rows)
            steps.prepare(run, last, draw, next_tokens, kind)
            logits = steps.prepare(run, last, None, whole_logits, kind)
            count += 2
            if rows not in drawn_apart:
                drawn_apart.add(rows)
                count += _prepare_draws(logits, draw, limits, vocab_size, top)
            if not decode:  # of echoes, each token's logits
                every: Any = np.zeros((limits.shards, length), np.int32)
                logits = steps.prepare(run, every, None, whole_logits, kind)
                logprobs_of.lower(logits, every, top=top).compile()
                count += 2
    return count


def _prepare_draws(logits: Any, draw: Draw, limits: Limits, vocab_size: int, top: int) -> int:
    longest = min(vocab_size, limits.context + MAX_BIASES)
    shards, rows = logits.shape[:2]
    edits = [no_edits(shards, rows, length, vocab_size) for length in edit_lengths(longest)]
    asked = [(None, top), *((some, reported) for some in edits for reported in (None, top))]
    for some, reported in asked:
        sample_apart.lower(logits, draw, some, top=reported).compile()
    return len(asked)
