# SPDX-License-Identifier: Apache-2.0
"""The engine: a model, its cache, and the requests that run on them."""

import operator
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ktx_jax.engine.requests import MAX_LOGPROBS, Request, SamplingParams, TokenLogprob
from ktx_jax.engine.sampling import Drawn
from ktx_jax.engine.scheduler import Limits, Scheduler, Share, Work
from ktx_jax.engine.step import Steps, make_draw, make_run
from ktx_jax.errors import KtxError
from ktx_jax.model.cache import new_cache
from ktx_jax.model.config import Config


class Engine:
    """Runs requests by continuous batching. Any thread may add, step and abort."""

    def __init__(
        self,
        config: Config,
        graphdef: Any,
        state: Any,
        limits: Limits,
        *,
        dtype: Any,
        device: jax.Device,
        eos_ids: frozenset[int],
    ):
        self.config, self.limits, self.dtype, self.eos_ids = config, limits, dtype, eos_ids
        self.steps, self._device = Steps(graphdef, state, dtype), device
        self._scheduler = Scheduler(limits)
        self._lock = threading.RLock()
        with jax.default_device(device):
            self._cache = new_cache(config, limits.pages, limits.page, dtype)

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
        """Computes one step; False if there was nothing to do."""
        with self._lock:
            work = self._scheduler.next_work()
            if work is None:
                return False
            drawn = jax.device_get(self._sample(work))
            for row, share in enumerate(work.shares):
                share.request.computed = share.stop
                if share.samples:
                    self._take(share, row, drawn)
            return True

    def _sample(self, work: Work) -> Drawn:
        requests = [share.request for share in work.shares]
        wanted = [r.params.logprobs for r in requests if r.params.logprobs is not None]
        top = None if not wanted else min(MAX_LOGPROBS, self.config.vocab_size) if any(wanted) else 0
        with jax.default_device(self._device):
            run, last = make_run(work, self.limits)
            drawn, self._cache = self.steps.sample(
                self.steps.leaves, self._cache, run, jnp.asarray(last), make_draw(requests, len(last)), top=top
            )
        return drawn

    def _take(self, share: Share, row: int, drawn: Drawn) -> None:
        request, token = share.request, int(drawn.token[row])
        wanted, logprob = request.params.logprobs, None
        if wanted is not None:
            assert drawn.logprob is not None
            assert drawn.top_ids is not None
            assert drawn.top_logprobs is not None
            pairs = zip(drawn.top_ids[row, :wanted].tolist(), drawn.top_logprobs[row, :wanted].tolist(), strict=True)
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
            while (pages := self._scheduler.borrow(-(-request.length // self.limits.page))) is None:
                self.step()
            request.pages = pages
            try:
                return np.concatenate(
                    [self._chunk_logits(request) for _ in range(0, request.length, self.limits.chunk)]
                )
            finally:
                self._scheduler.give_back(pages)

    def _chunk_logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        start, stop = request.computed, min(request.length, request.computed + self.limits.chunk)
        with jax.default_device(self._device):
            run, _ = make_run(Work((Share(request, start, stop),), decode=False), self.limits)
            at = jnp.arange(run.tokens.shape[0])
            out, self._cache = self.steps.logits(self.steps.leaves, self._cache, run, at)
        request.computed = stop
        return np.asarray(out)[: stop - start]
