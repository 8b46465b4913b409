# SPDX-License-Identifier: Apache-2.0
"""Steps that tell of a sequence's own tokens: their log-probabilities, or all logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ktx_jax.engine.requests import TokenLogprob, most_logprobs
from ktx_jax.engine.sampling import Drawn, logprobs_of
from ktx_jax.engine.scheduler import Share, Work
from ktx_jax.engine.stage import Kind
from ktx_jax.engine.step import Steps
from ktx_jax.model.cache import Run


# Not checked at run time: JAX puts NumPy arrays and placeholders into a pytree's leaves too.
@jax.tree_util.register_dataclass
@no_type_check
@dataclass(frozen=True)
class Echoed:
    """Of all tokens of a run, arrays with a leading shard axis, as far as someone wants them."""

    following: Drawn | None  # the log-probability of the token that follows each
    logits: Float[Array, "S T V"] | None


def start_echo(steps: Steps, work: Work, run: Run, last: Int[np.ndarray, "S L"], kind: Kind) -> Echoed:
    """Starts a step whose shares all ask about their own tokens."""
    at = np.broadcast_to(np.arange(run.tokens.shape[1], dtype=np.int32), run.tokens.shape)
    logits = steps.logits(run, at, kind=kind)
    following, tops = np.zeros(run.tokens.shape, np.int32), []
    for share, shard, here in _places(work, last):
        tokens = share.request.prompt[share.start + 1 : share.stop + 1]
        following[shard, here.start : here.start + len(tokens)] = tokens
        assert share.request.echo is not None
        tops.append(share.request.echo.top)
    drawn = None
    if any(top is not None for top in tops):
        drawn = logprobs_of(logits, following, top=most_logprobs(logits.shape[-1]))
    return Echoed(drawn, logits if None in tops else None)


def take_echo(echoed: Echoed, work: Work, last: Int[np.ndarray, "S L"]) -> None:
    """Gives each share's request its answers, from arrays that have been computed."""
    for share, shard, here in _places(work, last):
        echo = share.request.echo
        assert echo is not None
        if echo.top is None:
            assert echoed.logits is not None
            echo.parts.append(np.asarray(echoed.logits[shard, here]))
        else:
            assert echoed.following is not None
            stop = here.stop - 1 if share.samples else here.stop  # nothing follows the last token
            echo.parts += [logprob_at(echoed.following, (shard, i), echo.top) for i in range(here.start, stop)]


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
