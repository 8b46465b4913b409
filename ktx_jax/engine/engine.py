# SPDX-License-Identifier: Apache-2.0
"""The engine: a model, its cache, and the requests that run on them."""

import operator
import threading
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from ktx_jax.engine.requests import MAX_LOGPROBS, Request, SamplingParams, TokenLogprob
from ktx_jax.engine.sampling import Drawn
from ktx_jax.engine.scheduler import Limits, Scheduler, Share, Work
from ktx_jax.engine.stage import Kind
from ktx_jax.engine.step import Steps, make_draw, make_run
from ktx_jax.errors import KtxError
from ktx_jax.model.config import Config


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
        self._flight: deque[tuple[Work, Drawn]] = deque()
        self._lock = threading.RLock()

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queues a prompt; its tokens arrive in `Request.unread` as `step` is called.

        Raises:
          KtxError: the prompt is empty, leaves no room for a token, or holds an id outside the vocabulary.
        """
        prompt = self.check_prompt(prompt, room=1)
        room = self.limits.context - len(prompt)
        request = Request(prompt, params, min(params.max_tokens or room, room))
        with self._lock:
            self._scheduler.add(request)
        return request

    def check_prompt(self, prompt: Sequence[int], *, room: int) -> list[int]:
        """The prompt as a list, if it and `room` more tokens fit."""
        prompt, limit = [operator.index(token) for token in prompt], self.limits.context
        if not prompt:
            raise KtxError("the prompt is empty: give at least one token")
        if len(prompt) + room > limit:
            raise KtxError(
                f"the prompt has {len(prompt)} tokens; a context of {limit} holds at most {limit - room} "
                "(raise `context`, or shorten the prompt)"
            )
        if bad := [token for token in prompt if not 0 <= token < self.config.vocab_size]:
            raise KtxError(f"token id {bad[0]} is outside the vocabulary of {self.config.vocab_size}")
        return prompt

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
                self._flight.append((work, self._sample(work)))
            if not self._flight:
                return False
            work, drawn = self._flight.popleft()
            drawn = jax.device_get(drawn)
            self._scheduler.landed(work)
            for shard, shares in enumerate(work.by_shard(self.limits.shards)):
                for row, share in enumerate(shares):
                    self._take(share, (shard, row), drawn)
            return True

    def _sample(self, work: Work) -> Drawn:
        requests = [share.request for share in work.shares]
        wanted = [r.params.logprobs for r in requests if r.params.logprobs is not None]
        top = None if not wanted else min(MAX_LOGPROBS, self.config.vocab_size) if any(wanted) else 0
        run, last = make_run(work, self.limits)
        return self.steps.sample(run, last, make_draw(work, *last.shape), top=top, kind=self._kind(work))

    def _kind(self, work: Work) -> Kind:
        return "decode" if work.decode else "stream" if work.streams(self.limits.stream_above) else "prefill"

    def _take(self, share: Share, row: tuple[int, int], drawn: Drawn) -> None:
        request, token = share.request, int(drawn.token[row])
        if request.finish_reason is not None or not share.samples:  # it may have ended while its step was in flight
            return
        wanted, logprob = request.params.logprobs, None
        if wanted is not None:
            assert drawn.logprob is not None
            assert drawn.top_ids is not None
            assert drawn.top_logprobs is not None
            pairs = zip(drawn.top_ids[row][:wanted].tolist(), drawn.top_logprobs[row][:wanted].tolist(), strict=True)
            logprob = TokenLogprob(token, float(drawn.logprob[row]), tuple(pairs))
        request.output.append(token)
        request.unread.append((token, logprob))
        if token in self.eos_ids and not request.params.ignore_eos:
            self._scheduler.finish(request, "stop")
        elif len(request.output) >= request.limit:
            self._scheduler.finish(request, "length")

    def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """Logits of every position of one sequence, float32, in chunks through the cache."""
        request = Request(self.check_prompt(tokens, room=0), SamplingParams(), 0)
        with self._lock:
            while (pages := self._scheduler.borrow(-(-request.length // self.limits.page), request.shard)) is None:
                self.step()
            request.pages = pages
            try:
                return np.concatenate(
                    [self._chunk_logits(request) for _ in range(0, request.length, self.limits.chunk)]
                )
            finally:
                self._scheduler.give_back(pages, request.shard)

    def _chunk_logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        start, stop = request.computed, min(request.length, request.computed + self.limits.chunk)
        work = Work((Share(request, start, stop),), decode=False)
        run, _ = make_run(work, self.limits)
        at = np.broadcast_to(np.arange(run.tokens.shape[1], dtype=np.int32), run.tokens.shape)
        out = self.steps.logits(run, at, kind=self._kind(work))
        request.computed = stop
        return np.asarray(out[request.shard])[: stop - start]
