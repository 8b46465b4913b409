# SPDX-License-Identifier: Apache-2.0
"""What requests ask to be done to their logits: penalties, biases and grammars, as arrays for a step."""

from typing import Any

import numpy as np

from ktx_jax.engine.requests import Request
from ktx_jax.engine.sampling import Edits
from ktx_jax.engine.scheduler import Work
from ktx_jax.errors import KtxError

# Lengths of a row's list of edited tokens grow by this factor, so that there are few programs.
_GROWTH, _FEWEST = 16, 64


def wants_edits(request: Request) -> bool:
    p = request.params
    return bool(
        p.grammar is not None
        or p.logit_bias
        or p.presence_penalty
        or p.frequency_penalty
        or p.repetition_penalty != 1.0
    )


def make_edits(work: Work, shards: int, rows: int, vocab_size: int) -> Edits:
    """The edits of each share that samples, arrays [S, rows, ...]; other rows are left as they are.

    A request whose grammar fails has its `error` set.
    """
    lists = {
        (shard, row): _token_edits(share.request)
        for shard, shares in enumerate(work.by_shard(shards))
        for row, share in enumerate(shares)
        if share.samples and wants_edits(share.request)
    }
    longest = max((len(edits) for edits in lists.values()), default=0)
    made = no_edits(shards, rows, edit_lengths(longest)[-1], vocab_size)
    tokens, factor, add, allowed = (np.asarray(a) for a in (made.tokens, made.factor, made.add, made.allowed))
    for at, edits in lists.items():
        tokens[at][: len(edits)] = list(edits)
        if edits:
            factor[at][: len(edits)], add[at][: len(edits)] = np.asarray(list(edits.values())).T
    for shard, shares in enumerate(work.by_shard(shards)):
        for row, share in enumerate(shares):
            if share.samples and share.request.match is not None:
                try:
                    allowed[shard, row] = share.request.match.allowed()
                except KtxError as error:
                    share.request.error = error
    return made


def edit_lengths(longest: int) -> list[int]:
    """The lengths that lists of edited tokens are padded to, as far as one has room for `longest`."""
    lengths = [_FEWEST]
    while lengths[-1] < longest:
        lengths.append(lengths[-1] * _GROWTH)
    return lengths


def no_edits(shards: int, rows: int, length: int, vocab_size: int) -> Edits:
    """Edits, with room for `length` tokens a row, that leave every logit as it is."""
    shape = (shards, rows, length)
    tokens: Any = np.full(shape, vocab_size, np.int32)
    factor: Any = np.ones(shape, np.float32)
    add: Any = np.zeros(shape, np.float32)
    allowed: Any = np.full((shards, rows, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    return Edits(tokens, factor, add, allowed)


def _token_edits(request: Request) -> dict[int, tuple[float, float]]:
    """Of each token that is edited, the factor and the summand."""
    p, edits = request.params, {}
    if p.repetition_penalty != 1.0:
        edits = dict.fromkeys((*request.prompt, *request.counts), (float(p.repetition_penalty), 0.0))
    if p.presence_penalty or p.frequency_penalty:
        for token, count in request.counts.items():
            factor, _ = edits.get(token, (1.0, 0.0))
            edits[token] = factor, -p.presence_penalty - p.frequency_penalty * count
    for token, bias in p.logit_bias.items():
        factor, add = edits.get(token, (1.0, 0.0))
        edits[token] = factor, add + bias
    return edits
