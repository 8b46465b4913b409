# SPDX-License-Identifier: Apache-2.0
"""`AsyncEngine`: a model that many asyncio tasks ask at once."""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from ktx_jax.engine.reply import Chunk, Reader
from ktx_jax.engine.requests import Request, SamplingParams, TokenLogprob
from ktx_jax.errors import KtxError
from ktx_jax.llm import LLM


class QueueFull(KtxError):
    """Too many requests wait already. `retry_after`: seconds after which to try again."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class DeadlineExceeded(KtxError):
    """A reply was not complete when its deadline came."""


class EngineClosed(KtxError):
    """The engine takes no more requests: it is shutting down, or a step failed (`__cause__` says how)."""


@dataclass(frozen=True)
class Stats:
    """How the engine is doing. Sums count from its start.

    Attributes:
      running, waiting: requests now.
      batch: how many can run at once.
      pages_total, pages_free: cache pages; free ones include those that only the prefix cache holds.
      prompt_tokens: tokens of the prompts of admitted requests.
      cached_tokens: how many of those the prefix cache spared.
      generated_tokens: tokens drawn.
      finished: replies that ended, whatever the reason.
      preemptions: times that a running request gave its pages to an older one, to be computed anew.
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


class ReplyStream(AsyncIterator[Chunk]):
    """A reply as it comes, made by `AsyncEngine.generate`; its request is queued already.

    Leaving it early aborts the request: by `aclose`, at the end of `async with`, when the task that waits in it is
    cancelled, and when it is dropped.
    """

    def __init__(self, owner: "AsyncEngine", request: Request, deadline: float | None):
        self.request, self.deadline = request, deadline
        self._owner, self._loop = owner, asyncio.get_running_loop()
        self._come: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._over = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    def __aiter__(self) -> "ReplyStream":
        return self

    async def __anext__(self) -> Chunk:
        """The next piece; the last one has the finish reason.

        Raises:
          DeadlineExceeded: the deadline came first.
          EngineClosed: a step failed.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._come.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, Exception):
            self._over = True
            raise item
        self._over = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Aborts the request if it still runs; its pages are free after the step that is being computed."""
        self._drop()

    async def __aenter__(self) -> "ReplyStream":
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._drop()

    def __del__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if not self._over:
            self._over = True
            self._owner._abandon(self.request)


class AsyncEngine:
    """Runs an `LLM`'s requests for asyncio tasks, of any event loop and thread.

    One background thread computes while there is work and sleeps while there is none. The `LLM` itself may be used
    beside it: both share one engine.

    Args:
      llm: the model.
      max_queue: the most requests that may wait to run; further ones are refused with `QueueFull`.
    """

    def __init__(self, llm: LLM, *, max_queue: int = 256):
        if max_queue < 1:
            raise KtxError(f"max_queue should be at least 1; found {max_queue}")
        self.llm, self.max_queue = llm, max_queue
        self._engine = llm._engine
        self._wake = threading.Condition()
        self._arrivals: deque[_Live] = deque()  # these two cross threads; what follows is the stepping thread's
        self._abandoned: deque[Request] = deque()
        self._live: dict[Request, _Live] = {}
        self._closing_at: float | None = None  # when running requests are ended
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ktx-jax engine", daemon=True)
        self._thread.start()

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, *, deadline: float | None = None
    ) -> ReplyStream:
        """Queues a prompt at once, from a running event loop, and gives its reply as an async iterator.

        Args:
          prompt_ids: token ids, taken as they are.
          params: how tokens are drawn.
          deadline: seconds from now in which the reply has to be complete, time in the queue included.

        Raises:
          KtxError: the prompt is empty, does not fit the context, or holds an id outside the vocabulary.
          QueueFull: too many requests wait.
          EngineClosed: the engine is shutting down, or has failed.
        """
        request = self._engine.make_request(prompt_ids, params or SamplingParams())
        due = None if deadline is None else time.monotonic() + deadline
        with self._wake:
            if self._failure is not None:
                raise EngineClosed(f"a step failed: {self._failure}") from self._failure
            if self._closing_at is not None:
                raise EngineClosed("the engine is shutting down")
            waiting = self._engine.waiting + len(self._arrivals)
            if waiting >= self.max_queue:
                raise QueueFull(waiting, self._retry_after(waiting))
            stream = ReplyStream(self, request, due)
            self._arrivals.append(_Live(stream, Reader(self._engine, self.llm.tokenizer, request)))
            self._wake.notify()
        return stream

    async def score_prompt(self, ids: Sequence[int], top: int = 0) -> tuple[TokenLogprob | None, ...]:
        """Log-probabilities (nats, of the unmodified logits) of a prompt's own tokens, each given those before it.

        Args:
          ids: token ids.
          top: how many of the likeliest tokens to report at each place.

        Returns:
          One entry for each token; the first is None, as nothing comes before it.
        """
        return await asyncio.to_thread(self._engine.score, ids, top)

    def stats(self) -> Stats:
        """Figures for metrics; does not wait for the step that is being computed."""
        return Stats(waiting=self._engine.waiting + len(self._arrivals), **self._engine.figures())

    async def close(self, grace: float = 30.0) -> None:
        """Refuses new requests; running and waiting ones have `grace` seconds to finish, the rest end as "abort"."""
        with self._wake:
            self._closing_at = time.monotonic() + grace
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _retry_after(self, waiting: int) -> float:
        return float(math.ceil(1 + waiting / self._engine.limits.batch))

    def _abandon(self, request: Request) -> None:
        """From any thread, and from destructors: takes no lock."""
        self._abandoned.append(request)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._live or self._arrivals or self._closing_at is not None):
                    self._wake.wait()
                self._take_arrivals()
                if self._closing_at is not None and not self._live:
                    return
            try:
                self._drop_abandoned()
                self._end_late()
                if self._live and not self._engine.step():
                    time.sleep(0.001)  # nothing could be done: pages are lent elsewhere
                self._deliver()
            except Exception as error:  # whatever it was, those who wait have to hear of it
                self._fail(error)
                return

    def _take_arrivals(self) -> None:
        while self._arrivals:
            live = self._arrivals.popleft()
            self._live[live.request] = live
            self._engine.enqueue(live.request)

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            request = self._abandoned.popleft()
            self._engine.abort(request)
            self._live.pop(request, None)

    def _end_late(self) -> None:
        now = time.monotonic()
        for live in [live for live in self._live.values() if live.due is not None and live.due <= now]:
            self._engine.abort(live.request)
            self._live.pop(live.request)
            live.put(DeadlineExceeded("the reply was not complete when its deadline came"))
        if self._closing_at is not None and self._closing_at <= now:
            for request in self._live:
                self._engine.abort(request)

    def _deliver(self) -> None:
        for request, live in list(self._live.items()):
            while live.reader.ready:
                chunk = live.reader.read()
                live.put(chunk)
                if chunk.finish_reason is not None:
                    self._live.pop(request)
                    break

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._failure = error
            self._take_arrivals()
        for live in self._live.values():
            failure = EngineClosed(f"a step failed: {error}")
            failure.__cause__ = error
            live.put(failure)
        self._live.clear()


class _Live:
    """A request under way, and where its pieces go. Holds no reference to its stream, so that a dropped one ends."""

    def __init__(self, stream: ReplyStream, reader: Reader):
        self.request, self.due, self.reader = stream.request, stream.deadline, reader
        self._loop, self._put = stream._loop, stream._come.put_nowait

    def put(self, item: Chunk | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._put, item)
