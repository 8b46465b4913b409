# SPDX-License-Identifier: Apache-2.0
"""The perplexity of long texts, window by window, in a run that survives being killed."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ktx_jax.engine.scoring import Score
from ktx_jax.engine.windows import Perplexity, perplexity_windows
from ktx_jax.evaluate.identity import digest, model_identity
from ktx_jax.evaluate.journal import Journal
from ktx_jax.llm import LLM

Advance = Callable[[int, int], object]
"""Called with tokens done and tokens in all."""


def perplexity_run(llm: LLM, text: str, window: int, stride: int | None) -> Mapping[str, Any]:
    """What a perplexity depends on, for its `Journal`."""
    return {"perplexity": model_identity(llm), "text": digest(text), "window": window, "stride": stride}


def measure_perplexity(
    llm: LLM, text: str, window: int, stride: int | None, journal: Journal, advance: Advance | None = None
) -> Perplexity:
    """`LLM.perplexity`, each window kept in the journal when it is done, and those that are there left out.

    Raises:
      KtxError: as `LLM.perplexity`.
    """
    windows = perplexity_windows(llm.tokenizer, text, window, stride)
    left = [at for at in range(len(windows)) if str(at) not in journal]
    total = sum(one.length for one in windows)
    done = total - sum(windows[at].length for at in left)

    def keep(index: int, score: Score) -> None:
        nonlocal done
        journal.add(str(left[index]), score.logprobs.tolist())
        done += windows[left[index]].length
        if advance is not None:
            advance(done, total)

    if advance is not None:
        advance(done, total)
    llm.score_windows([windows[at] for at in left], keep)
    return Perplexity.of([np.asarray(journal[str(at)], np.float32) for at in range(len(windows))])
