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
        request = self.make_request(prompt, params)
        self.enqueue(request)
        return request

    def make_request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request to `enqueue`; errors as of `add`."""
        prompt = self.check_prompt(prompt, room=1)
        room = self.limits.context - len(prompt)
        return Request(prompt, params, min(params.max_tokens or room, room))

    def enqueue(self, request: Request) -> None:
        with self._lock:
            self._scheduler.add(request)

    @property
    def waiting(self) -> int:
        """Requests that have not been let in yet."""
        return len(self._scheduler.waiting)

    def figures(self) -> dict[str, int]:
        """What `Stats` reports, but for those that wait."""
        scheduler = self._scheduler
        return {
            "running": len(scheduler.running),
            "batch": self.limits.batch,
            "pages_total": self.limits.pages,
            "pages_free": len(scheduler.free_pages),
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "generated_tokens": 0,
            "finished": 0,
            "preemptions": 0,
        }

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
        return self.steps.sample(run, last, make_draw(work, *last.shape), top=top, decode=work.decode)

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
        ends = token in self.eos_ids and not request.params.ignore_eos
        if ends or token in request.params.stop_token_ids:
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

    def score(self, tokens: Sequence[int], top: int) -> tuple[TokenLogprob | None, ...]:
        """Log-probability of each token of a sequence given those before it, and the `top` likeliest; first None."""
        logits = jax.nn.log_softmax(self.logits(tokens)[:-1], axis=-1)
        chosen = jnp.take_along_axis(logits, jnp.asarray(tokens[1:])[:, None], axis=-1)[:, 0].tolist()
        values, ids = jax.device_get(jax.lax.top_k(logits, top))
        rows = zip(tokens[1:], chosen, ids.tolist(), values.tolist(), strict=True)
        return (None, *(TokenLogprob(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows))

    def _chunk_logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        start, stop = request.computed, min(request.length, request.computed + self.limits.chunk)
        run, _ = make_run(Work((Share(request, start, stop),), decode=False), self.limits)
        at = np.broadcast_to(np.arange(run.tokens.shape[1], dtype=np.int32), run.tokens.shape)
        out = self.steps.logits(run, at)
        request.computed = stop
        return np.asarray(out[request.shard])[: stop - start]
