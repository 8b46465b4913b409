# SPDX-License-Identifier: Apache-2.0
"""What is asked of the engine, and how far each request has come."""

import math
import secrets
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ktx_jax.engine.grammar import Grammar, Match
from ktx_jax.errors import KtxError

FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 20
MAX_BIASES = 1024


def most_logprobs(vocab_size: int) -> int:
    """How many of the likeliest tokens a step reports, where any are asked for."""
    return min(MAX_LOGPROBS, vocab_size)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
      max_tokens: the most tokens to generate; None for as many as the context holds.
      temperature: divides the logits; 0 takes the most likely token.
      top_p: keeps the most likely tokens that together reach this probability (after temperature and top_k).
      top_k: keeps this many of the most likely tokens; 0 keeps all.
      min_p: drops tokens less likely than this part of the likeliest (after temperature); 0 keeps all.
      presence_penalty: taken from the logit of every token that the reply holds already; -2 to 2.
      frequency_penalty: taken from a token's logit for each time the reply holds it; -2 to 2.
      repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the prompt or
        the reply holds; 1 changes nothing.
      logit_bias: added to the logits of these token ids; -100 to 100. Greedy draws heed it too, as they do penalties.
      seed: makes the draw repeatable, whatever else is in the batch; None draws a fresh one.
      stop: texts that end the reply; the reply's text ends before them.
      stop_token_ids: ids that end the reply, beside the model's own end tokens.
      logprobs: how many of the most likely tokens to report beside each token's own log-probability; None for neither.
      ignore_eos: go on past the model's end tokens, as benchmarks do.
      grammar: what the reply has to match; see `Grammar`. A reply that `max_tokens` cuts matches as far as it goes.
    """

    max_tokens: int | None = 64
    temperature: int | float = 0.3
    top_p: int | float = 0.95
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    min_p: int | float = 0.0
    presence_penalty: int | float = 0.0
    frequency_penalty: int | float = 0.0
    repetition_penalty: int | float = 1.0
    logit_bias: Mapping[int, int | float] = field(default_factory=dict)
    stop_token_ids: Sequence[int] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        checks = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            "temperature": (0.0 <= self.temperature < math.inf, "a number from 0"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "min_p": (0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            "presence_penalty": (-2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            "frequency_penalty": (-2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            "repetition_penalty": (0.0 < self.repetition_penalty < math.inf, "a number above 0"),
            "logit_bias": (
                len(self.logit_bias) <= MAX_BIASES
                and all(i >= 0 and -100.0 <= bias <= 100.0 for i, bias in self.logit_bias.items()),
                f"at most {MAX_BIASES} token ids, each with a number from -100 to 100",
            ),
            "stop_token_ids": (all(token >= 0 for token in self.stop_token_ids), "token ids from 0"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1, or None"),
            "stop": (all(self.stop), "texts that are not empty"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or None"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise KtxError(f"{name} should be {expected}; found {getattr(self, name)!r}")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (nats, before temperature and truncation) of a generated token, and the likeliest ones there."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Echo:
    """What is asked about a sequence's own tokens, and the answers so far, a part for each chunk.

    Attributes:
      top: how many of the likeliest tokens to report beside the log-probability of each; None for whole logits.
    """

    top: int | None
    parts: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """One sequence in the engine's care."""

    prompt: list[int]
    params: SamplingParams
    limit: int  # tokens that may be generated
    output: list[int] = field(default_factory=list)
    unread: deque[tuple[int, TokenLogprob | None]] = field(default_factory=deque)
    computed: int = 0  # tokens whose latents are in the cache, or on their way there
    pages: list[int] = field(default_factory=list)
    kept: int = 0  # of its pages, those in the prefix cache
    cached: int | None = None  # tokens of the prompt that the prefix cache spared; None before it is let in
    shard: int = 0  # of the `data` axis, whose pages these are
    echo: Echo | None = None  # of a sequence whose own tokens are asked about: it draws none
    finish_reason: FinishReason | None = None
    error: KtxError | None = None  # why it was aborted, if that was its own fault
    seed: int = 0
    match: Match | None = None  # how far the reply has come in its grammar
    counts: Counter[int] = field(default_factory=Counter)  # of the reply's tokens

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        self.match = self.params.grammar.start() if self.params.grammar is not None else None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def prefilling(self) -> bool:
        """Whether more than the newest token is still to be computed."""
        return self.length - self.computed > 1 or not self.output

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of the prompt and what was generated after it."""
        split = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - split, 0) : max(stop - split, 0)]
