# SPDX-License-Identifier: Apache-2.0
"""Steps that tell of a sequence's own tokens: their log-probabilities, or all logits."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from ktx_jax.engine.requests import MAX_LOGPROBS, TokenLogprob
from ktx_jax.engine.sampling import Drawn, score
from ktx_jax.engine.scheduler import Share, Work
from ktx_jax.engine.step import Steps
from ktx_jax.model.cache import Run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Of all tokens of a run, arrays with a leading shard axis."""

    following: Drawn  # the log-probability of the token that follows each
    logits: Float[jax.Array | np.ndarray, "S T V"] | None  # where someone wants them whole


def start_scores(steps: Steps, work: Work, run: Run, last: Int[np.ndarray, "S L"]) -> Scores:
    """Starts a step whose shares are all of sequences to be scored."""
    at = np.broadcast_to(np.arange(run.tokens.shape[1], dtype=np.int32), run.tokens.shape)
    logits = steps.logits(run, at)
    following, tops = np.zeros(run.tokens.shape, np.int32), []
    for share, shard, here in _places(work, last):
        tokens = share.request.prompt[share.start + 1 : share.stop + 1]
        following[shard, here.start : here.start + len(tokens)] = tokens
        assert share.request.scoring is not None
        tops.append(share.request.scoring.top)
    top = min(MAX_LOGPROBS, logits.shape[-1]) if any(tops) else 0
    return Scores(score(logits, following, top=top), logits if None in tops else None)


def take_scores(scores: Scores, work: Work, last: Int[np.ndarray, "S L"]) -> None:
    """Gives each share's request its scores, from arrays that have been computed."""
    for share, shard, here in _places(work, last):
        scoring = share.request.scoring
        assert scoring is not None
        if scoring.top is None:
            assert scores.logits is not None
            scoring.parts.append(np.asarray(scores.logits[shard, here]))
        else:
            stop = here.stop - 1 if share.samples else here.stop  # nothing follows the last token
            scoring.parts += [logprob_at(scores.following, (shard, i), scoring.top) for i in range(here.start, stop)]


def logprob_at(drawn: Drawn, place: tuple[int, int], top: int) -> TokenLogprob:
    """What is reported of one token of a step, with the `top` likeliest."""
    assert drawn.logprob is not None
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    pairs = zip(drawn.top_ids[place][:top].tolist(), drawn.top_logprobs[place][:top].tolist(), strict=True)
    return TokenLogprob(int(drawn.token[place]), float(drawn.logprob[place]), tuple(pairs))


def _places(work: Work, last: Int[np.ndarray, "S L"]) -> Iterator[tuple[Share, int, slice]]:
    """Where each share lies in its shard's run, which `make_run` laid out."""
    for shard, shares in enumerate(work.by_shard(len(last))):
        for row, share in enumerate(shares):
            stop = int(last[shard, row]) + 1
            yield share, shard, slice(stop - (share.stop - share.start), stop)
