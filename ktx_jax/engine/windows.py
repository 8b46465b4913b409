# SPDX-License-Identifier: Apache-2.0
"""Texts cut into the windows that are scored, and the perplexity that comes of them."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from ktx_jax.engine.branches import Window
from ktx_jax.errors import KtxError
from ktx_jax.tokenizer import Tokenizer

Text: TypeAlias = str | Sequence[int]


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text.

    Attributes:
      tokens: how many were scored.
      nats: the mean of their negative log-probabilities.
      nats_error: the standard error of that mean, taking tokens for independent.
    """

    tokens: int
    nats: float
    nats_error: float

    @classmethod
    def of(cls, logprobs: Sequence[Float[np.ndarray, " _"]]) -> "Perplexity":
        """Of all tokens' log-probabilities together."""
        nats = -np.concatenate(logprobs).astype(np.float64)
        error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
        return cls(len(nats), float(nats.mean()), float(error))

    @property
    def value(self) -> float:
        """exp of the mean."""
        return math.exp(self.nats)

    @property
    def error(self) -> float:
        """The standard error of `value`."""
        return self.value * self.nats_error


def pair_windows(tokenizer: Tokenizer, pairs: Sequence[tuple[Text, Text]]) -> list[Window]:
    """Continuations to be scored after their contexts: pairs of those, either as text or as token ids.

    Two texts are tokenized together, so that the words at the seam are whole; spaces that end the context, and a word
    that the seam cuts, count as the continuation's.

    Raises:
      KtxError: something is no pair; a context is empty, or its end is within the first token, and the tokenizer puts
        none before it.
    """
    windows = []
    for at, pair in enumerate(pairs):
        try:
            if isinstance(pair, str | bytes):
                raise TypeError
            context, continuation = pair
        except (TypeError, ValueError):
            raise KtxError(f"pairs should be a list of (context, continuation); found at {at}: {pair!r:.60}") from None
        windows.append(_pair_window(tokenizer, context, continuation))
    return windows


def _pair_window(tokenizer: Tokenizer, context: Text, continuation: Text) -> Window:
    if isinstance(context, str) and isinstance(continuation, str):
        head, whole = tokenizer.encode(context.rstrip(" ")), tokenizer.encode(context + continuation)
        start = agreement(head, whole)
    else:
        head = tokenizer.encode(context) if isinstance(context, str) else token_ids(context)
        plain = isinstance(continuation, str)
        whole = head + (tokenizer.encode(continuation, False) if plain else token_ids(continuation))
        start = len(head)
    if not start:
        raise KtxError("the context is empty: nothing comes before the continuation's first token")
    return Window(np.asarray(whole, np.int32), start)


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def token_ids(ids: Sequence[int]) -> list[int]:
    """Token ids, taken as they are.

    Raises:
      KtxError: they are something else; bytes too, whose numbers are no tokens.
    """
    try:
        if not isinstance(ids, bytes | bytearray):
            return [operator.index(one) for one in ids]
    except TypeError:
        pass
    raise KtxError(f"expected a text (str) or token ids (whole numbers); found {type(ids).__name__} {ids!r:.60}")


def rolling_windows(tokenizer: Tokenizer, text: Text, context: int) -> list[Window]:
    """Every token of a text scored once: first `context` tokens after the beginning-of-text token, then window by
    window as many tokens as are left, each window as long as the context. lm-evaluation-harness cuts so.

    Raises:
      KtxError: the tokenizer has neither a beginning-of-text nor an end-of-text token.
    """
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise KtxError("the model has no token that begins a text: nothing comes before the first one")
    whole = np.asarray([first, *_ids(tokenizer, text, False)], np.int32)
    windows, scored = [], 1
    while scored < len(whole):
        end = min(scored + context, len(whole))
        begin = max(end - context - 1, 0)
        windows.append(Window(whole[begin:end], scored - begin))
        scored = end
    return windows


def perplexity_windows(tokenizer: Tokenizer, text: Text, window: int, stride: int | None) -> list[Window]:
    """The windows over a text that its perplexity is taken from.

    Without `stride`, as llama.cpp does and most figures of GGUF files are: windows side by side, the first token of
    each replaced by the beginning-of-text token, and the second half of each scored; a rest is left out. With `stride`,
    as Hugging Face's guide does: a window begins `stride` tokens after the one before, and scores what that did not,
    save its own first token where `stride` is the window: nothing comes before it.

    Raises:
      KtxError: the text is shorter than one window, or the numbers make no sense.
    """
    least = 3 if stride is None else 2  # the second half has a token that is not the first
    if window < least:
        raise KtxError(f"window should be at least {least}{' without a stride' * (least > 2)}; found {window}")
    if stride is not None and not 0 < stride <= window:
        raise KtxError(f"stride should be from 1 to the window of {window}; found {stride}")
    whole = np.asarray(_ids(tokenizer, text, True), np.int32)
    if len(whole) < window:
        raise KtxError(
            f"the text has {len(whole)} tokens, too few for a window of {window}: give more text, or a smaller window"
        )
    if stride is None:
        windows = whole[: len(whole) // window * window].reshape(-1, window).copy()
        if whole[0] == tokenizer.bos_id:
            windows[:, 0] = whole[0]
        return [Window(row, window // 2 + 1) for row in windows]
    starts = range(0, len(whole) - window + stride, stride)
    ends = [min(start + window, len(whole)) for start in starts]
    before = [1, *ends]
    return [
        Window(whole[start:end], max(scored - start, 1))
        for start, end, scored in zip(starts, ends, before, strict=False)
    ]


def _ids(tokenizer: Tokenizer, text: Text, first: bool) -> list[int]:
    """Token ids of a text to be measured, with those that begin it if `first`; ids as they are."""
    # What looks like a control token there is ordinary text.
    return tokenizer.encode(text, first, parse_special=False) if isinstance(text, str) else token_ids(text)
