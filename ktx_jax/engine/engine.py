# SPDX-License-Identifier: Apache-2.0
"""The engine: a model, its cache, and the requests that run on them."""

import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ktx_jax.engine.branches import Window
from ktx_jax.engine.echo import Echoed, logprob_at, start_echo, take_echo
from ktx_jax.engine.edits import make_edits, wants_edits
from ktx_jax.engine.requests import MAX_LOGPROBS, Echo, Request, SamplingParams, TokenLogprob, most_logprobs
from ktx_jax.engine.sampling import Drawn, sample_apart
from ktx_jax.engine.scheduler import Limits, Scheduler, Work
from ktx_jax.engine.scoring import Score, Scoring
from ktx_jax.engine.stage import Kind
from ktx_jax.engine.step import Steps, make_draw, make_run
from ktx_jax.engine.warm import prepare_all
from ktx_jax.errors import KtxError
from ktx_jax.model.config import Config


@dataclass(frozen=True)
class Stats:
    """How an engine is doing. Sums count from its start.

    Attributes:
      running, waiting: requests now.
      batch: how many can run at once.
      pages_total, pages_free: cache pages; free ones include those that only the prefix cache holds.
      prompt_tokens: tokens of the prompts of requests that were let in.
      cached_tokens: how many of those the prefix cache spared.
      generated_tokens: tokens drawn.
      finished: requests that ended, whatever the reason.
      preemptions: how often a request had to give its pages to an older one, to be computed anew.
    """

    running: int
    waiting: int
    batch: int
    pages_total: int
    pages_free: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: int
    preemptions: int


class Engine:
    """Runs requests by continuous batching. Any thread may add, step and abort."""

    def __init__(
        self,
        config: Config,
        steps: Steps,
        limits: Limits,
        *,
        eos_ids: frozenset[int],
    ):
        self.config, self.steps, self.limits, self.eos_ids = config, steps, limits, eos_ids
        self._scheduler = Scheduler(limits, steps.depth)
        self._flight: deque[tuple[Work, Int[np.ndarray, "S L"], Drawn | Echoed]] = deque()
        self._generated = 0
        self._lock = threading.RLock()

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queues a prompt; its tokens arrive in `Request.unread` as `step` is called.

        Raises:
          KtxError: the prompt is empty, leaves no room for a token, or it or `params` name an id that is no token's.
        """
        request = self.make_request(prompt, params)
        self.enqueue(request)
        return request

    def make_request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request to `enqueue`; errors as of `add`."""
        prompt = self.check_prompt(prompt, room=1)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        room = self.limits.context - len(prompt)
        return Request(prompt, params, min(params.max_tokens or room, room))

    def make_echo(self, tokens: Sequence[int], top: int | None) -> Request:
        """A request to `enqueue` that asks about its own tokens; the answers gather in `Request.echo`."""
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            raise KtxError(f"top should be 0 to {MAX_LOGPROBS}; found {top}")
        return Request(self.check_prompt(tokens, room=0), SamplingParams(), 0, echo=Echo(top))

    def enqueue(self, request: Request) -> None:
        with self._lock:
            self._scheduler.add(request)

    def pace(self, tokens: int) -> None:
        """Sets how many prompt tokens a step takes at most, so how long newcomers wait.

        Not where long prompts stream weights: each of their steps brings all of them, however few its tokens.
        """
        if self.limits.stream_above is None:
            self._scheduler.room = max(self.limits.tile, min(tokens, self.limits.chunk))

    def warm_up(self) -> int:
        """Compiles whatever requests may need, so that none waits for it later; how many programs those are."""
        with self._lock:
            return prepare_all(self.steps, self.limits, self.config.vocab_size)

    def stats(self) -> Stats:
        """Figures for metrics; does not wait for the step that is being computed."""
        scheduler = self._scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            batch=self.limits.batch * self.limits.shards,
            pages_total=self.limits.pages * self.limits.shards,
            pages_free=sum(pool.available for pool in scheduler.pages),
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=self._generated,
            finished=scheduler.finished,
            preemptions=scheduler.preemptions,
        )

    def check_prompt(self, prompt: Sequence[int], *, room: int, name: str = "the prompt") -> list[int]:
        """The prompt as a list, if it and `room` more tokens fit; errors call it `name`."""
        prompt, limit = [operator.index(token) for token in prompt], self.limits.context
        if not prompt:
            raise KtxError(f"{name} is empty: give at least one token")
        if len(prompt) + room > limit:
            raise KtxError(
                f"{name} has {len(prompt)} tokens; a context of {limit} holds at most {limit - room} "
                f"(raise `context`, or shorten {name})"
            )
        self._check_ids(name, prompt)
        return prompt

    def _check_ids(self, where: str, tokens: Iterable[int]) -> None:
        if bad := [token for token in tokens if not 0 <= token < self.config.vocab_size]:
            raise KtxError(f"{where}: token id {bad[0]} is outside the vocabulary of {self.config.vocab_size}")

    def abort(self, request: Request) -> None:
        """Ends a request early; does nothing to one that has ended."""
        with self._lock:
            if request.finish_reason is None:
                self._scheduler.finish(request, "abort")

    def end(self, request: Request) -> None:
        """Ends a request because its text is complete (a stop text was met)."""
        with self._lock:
            if request.finish_reason is None:
                self._scheduler.finish(request, "stop")

    def step(self) -> bool:
        """Starts as many steps as may be in flight and takes what the oldest drew; False if there was nothing to do."""
        with self._lock:
            while len(self._flight) < self.steps.depth and (work := self._scheduler.next_work()) is not None:
                self._flight.append(self._start(work))
            if not self._flight:
                return False
            work, last, result = self._flight.popleft()
            result = jax.device_get(result)
            self._scheduler.landed(work)
            if isinstance(result, Echoed):
                take_echo(result, work, last)
            for shard, shares in enumerate(work.by_shard(self.limits.shards)):
                for row, share in enumerate(shares):
                    if not share.samples or share.request.finish_reason is not None:  # it may have ended meanwhile
                        continue
                    if isinstance(result, Echoed):
                        self._scheduler.finish(share.request, "stop")
                    else:
                        self._take(share.request, (shard, row), result)
            return True

    def _start(self, work: Work) -> tuple[Work, Int[np.ndarray, "S L"], Drawn | Echoed]:
        run, last = make_run(work, self.limits)
        kind = self._kind(work)
        if work.echo:
            return work, last, start_echo(self.steps, work, run, last, kind)
        shards, rows = last.shape
        draw, sampling = make_draw(work, shards, rows), [share.request for share in work.shares if share.samples]
        edited = any(map(wants_edits, sampling))
        told = any(request.params.logprobs is not None for request in sampling)
        if not (edited or told):
            return work, last, self.steps.sample(run, last, draw, kind=kind)
        logits = self.steps.logits(run, last, kind=kind)  # computed while we find what the grammars allow
        edits = make_edits(work, shards, rows, self.config.vocab_size) if edited else None
        top = most_logprobs(self.config.vocab_size) if told else None
        return work, last, sample_apart(logits, draw, edits, top=top)

    def _kind(self, work: Work) -> Kind:
        return "decode" if work.decode else "stream" if work.streams(self.limits.stream_above) else "prefill"

    def _take(self, request: Request, row: tuple[int, int], drawn: Drawn) -> None:
        if request.error is not None:
            self._scheduler.finish(request, "abort")
            return
        token, wanted = int(drawn.token[row]), request.params.logprobs
        request.output.append(token)
        request.counts[token] += 1
        self._generated += 1
        request.unread.append((token, None if wanted is None else logprob_at(drawn, row, wanted)))
        match = request.match
        if match is not None:
            match.accept(token)
        ends = token in self.eos_ids and (match is not None or not request.params.ignore_eos)
        if ends or token in request.params.stop_token_ids or (match is not None and match.complete):
            self._scheduler.finish(request, "stop")
        elif len(request.output) >= request.limit:
            self._scheduler.finish(request, "length")

    def score(self, wanted: Sequence[Window], done: Callable[[int, Score], object]) -> None:
        """Scores sequences; calls `done` with a sequence's place and its scores once it is complete, in any order.

        Raises:
          KtxError: a sequence has no room or an unknown token; it is named by its place. Nothing has been computed
            then.
        """
        for at, one in enumerate(wanted):
            self.check_prompt(one.tokens[: one.length or 1].tolist(), room=0, name=f"sequence {at}")
            self.check_prompt(one.tokens[-1:].tolist(), room=0, name=f"sequence {at}")
        scoring = Scoring(wanted, self.steps, self._scheduler, self.limits)
        try:
            while not scoring.done:
                with self._lock:
                    complete = scoring.step()
                    if complete is None and not self.step():
                        scoring.start_over()  # requests and scores hold the pages that both wait for
                        self.step()
                for index, scored in complete or ():
                    done(index, scored)
        finally:
            with self._lock:
                scoring.close()

    def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """Logits after each token of one sequence, float32, computed in chunks through the cache."""
        return np.concatenate(self._asked(self.make_echo(tokens, None)))

    def echo(self, tokens: Sequence[int], top: int = 0) -> tuple[TokenLogprob | None, ...]:
        """Log-probability of each token of a sequence given those before it, and the `top` likeliest; first None."""
        return None, *self._asked(self.make_echo(tokens, top))

    def _asked(self, request: Request) -> list[Any]:
        self.enqueue(request)
        try:
            while request.finish_reason is None:
                self.step()
        finally:
            self.abort(request)
        assert request.echo is not None
        return request.echo.parts
