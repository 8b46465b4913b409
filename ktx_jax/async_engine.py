# SPDX-License-Identifier: Apache-2.0
"""`AsyncEngine`: a model that many asyncio tasks ask at once."""

import asyncio
import atexit
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from ktx_jax.engine.engine import Stats
from ktx_jax.engine.grammar import prepare_grammars
from ktx_jax.engine.reply import Chunk, Reader
from ktx_jax.engine.requests import Request, SamplingParams, TokenLogprob
from ktx_jax.errors import KtxError
from ktx_jax.llm import LLM

__all__ = ["AsyncEngine", "DeadlineExceeded", "EngineClosed", "QueueFull", "ReplyStream", "Stats"]


class QueueFull(KtxError):
    """Too many requests wait already. `retry_after`: seconds after which a place may be free."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class DeadlineExceeded(KtxError):
    """A reply was not complete when its deadline came."""


class EngineClosed(KtxError):
    """The engine takes no more requests: it is shutting down, or a step failed (`__cause__` says how)."""


class ReplyStream(AsyncIterator[Chunk]):
    """A reply as it comes, made by `AsyncEngine.generate`; its request is queued already.

    Leaving it early aborts the request: by `aclose`, at the end of `async with`, when the task that waits in it is
    cancelled, and when it is dropped.
    """

    _over = True  # until it is made

    def __init__(self, abandon: Callable[[Request], None], request: Request):
        self.request, self._abandon = request, abandon
        self._come: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._over = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache spared; known from the first piece on."""
        return self.request.cached or 0

    def __aiter__(self) -> "ReplyStream":
        return self

    async def __anext__(self) -> Chunk:
        """The next piece; the last one has the finish reason.

        Raises:
          DeadlineExceeded: the deadline came first.
          EngineClosed: a step failed.
          KtxError: the reply cannot go on, as its grammar grew beyond bounds.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._come.get()
        except asyncio.CancelledError:
            self._drop()
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

    async def __aexit__(self, *_: Any) -> None:
        self._drop()

    def __del__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if not self._over:
            self._over = True
            self._abandon(self.request)


def _due(deadline: int | float | None) -> float:
    return math.inf if deadline is None else time.monotonic() + deadline


class _Reply:
    """A reply under way, and where its pieces go. Holds no reference to its stream, so that a dropped one ends."""

    def __init__(self, stream: ReplyStream, reader: Reader, due: float):
        self.request, self.due, self._reader = stream.request, due, reader
        self._loop, self._put = asyncio.get_running_loop(), stream._come.put_nowait

    def deliver(self) -> bool:
        """Passes on what has come; whether that was the last."""
        while self._reader.ready:
            try:
                chunk = self._reader.read()
            except KtxError as error:
                self.put(error)
                return True
            self.put(chunk)
            if chunk.finish_reason is not None:
                return True
        return False

    def put(self, item: Chunk | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._put, item)


class _Score:
    """A sequence that is being scored."""

    def __init__(self, request: Request, due: float):
        self.request, self.due = request, due
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[tuple[TokenLogprob | None, ...]] = self._loop.create_future()

    def deliver(self) -> bool:
        if self.request.finish_reason is None:
            return False
        assert self.request.echo is not None
        if self.request.finish_reason == "abort":
            self.put(EngineClosed("the engine was shut down before the scores were complete"))
        else:
            self.put((None, *self.request.echo.parts))
        return True

    def put(self, item: tuple[TokenLogprob | None, ...] | Exception) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, item)

    def _settle(self, item: tuple[TokenLogprob | None, ...] | Exception) -> None:
        if self.future.done():
            return
        if isinstance(item, Exception):
            self.future.set_exception(item)
        else:
            self.future.set_result(item)


class AsyncEngine:
    """Runs an `LLM`'s requests for asyncio tasks, of any event loop and thread.

    One background thread computes while there is work and sleeps while there is none, until `close`. The `LLM` itself
    may be used beside it: both share one engine.

    Args:
      llm: the model.
      max_queue: the most requests that may wait to run; further ones are refused with `QueueFull`.
      chunk: the most prompt tokens in a step. A newcomer waits for the step that is being computed: small ones let
        short prompts through while a long one is read, large ones read faster.

    Attributes:
      llm: the model.
    """

    def __init__(self, llm: LLM, *, max_queue: int = 256, chunk: int = 128):
        if max_queue < 1:
            raise KtxError(f"max_queue should be at least 1; found {max_queue}")
        if chunk < 1:
            raise KtxError(f"chunk should be at least 1; found {chunk}")
        self.llm, self._max_queue = llm, max_queue
        self._engine = llm._engine
        self._engine.pace(chunk)
        self._wake = threading.Condition()
        self._arrivals: deque[_Reply | _Score] = deque()
        self._abandoned: deque[Request] = deque()
        self._live: dict[Request, _Reply | _Score] = {}  # the stepping thread's own
        self._busy = 0.0  # seconds spent in steps
        self._ends_at: float | None = None  # when what still runs is aborted
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ktx-jax engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop, 0.0)  # a thread inside XLA while the process is taken down would crash it

    def warm_up(self) -> int:
        """Compiles all that requests may need, and makes ready what grammars need, so that no request waits for either.

        Takes its time: not for the thread of an event loop. Returns how many programs there are.
        """
        with contextlib.suppress(KtxError):  # without llguidance there are no grammars
            prepare_grammars(self.llm.tokenizer)
        return self._engine.warm_up()

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, *, deadline: int | float | None = None
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
        stream = ReplyStream(self._abandoned.append, self._engine.make_request(prompt_ids, params or SamplingParams()))
        try:
            self._submit(_Reply(stream, Reader(self._engine, self.llm.tokenizer, stream.request), _due(deadline)))
        except KtxError:
            stream._over = True
            raise
        return stream

    async def score_prompt(
        self, ids: Sequence[int], top: int = 0, *, deadline: int | float | None = None
    ) -> tuple[TokenLogprob | None, ...]:
        """Log-probabilities (nats, of the unmodified logits) of a prompt's own tokens, each given those before it.

        Args:
          ids: token ids.
          top: how many of the likeliest tokens to report at each place, at most 20.
          deadline: seconds from now.

        Returns:
          One entry for each token; the first is None, as nothing comes before it.

        Raises:
          As `generate`; DeadlineExceeded.
        """
        live = _Score(self._engine.make_echo(ids, top), _due(deadline))
        self._submit(live)
        try:
            return await live.future
        except asyncio.CancelledError:
            self._abandoned.append(live.request)
            raise

    def stats(self) -> Stats:
        """Figures for metrics; does not wait for the step that is being computed."""
        stats = self._engine.stats()
        return replace(stats, waiting=stats.waiting + len(self._arrivals))

    async def close(self, grace: int | float = 30.0) -> None:
        """Refuses new requests; running and waiting ones have `grace` seconds to finish, the rest end as "abort"."""
        await asyncio.to_thread(self._stop, grace)

    def _stop(self, grace: int | float) -> None:
        with self._wake:
            self._ends_at = time.monotonic() + grace
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self._stop)
        self._engine.pace(self._engine.limits.chunk)

    def _submit(self, live: _Reply | _Score) -> None:
        with self._wake:
            if self._failure is not None:
                raise EngineClosed(f"a step failed: {self._failure}") from self._failure
            if self._ends_at is not None:
                raise EngineClosed("the engine is shutting down")
            stats = self.stats()
            if stats.running + stats.waiting >= stats.batch + self._max_queue:
                interval = self._busy / stats.finished if stats.finished else 1.0
                raise QueueFull(stats.waiting, float(math.ceil(max(interval, 1.0))))
            self._arrivals.append(live)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._live or self._arrivals or self._ends_at is not None):
                    self._wake.wait()
                arrived = [self._arrivals.popleft() for _ in range(len(self._arrivals))]
                if not (arrived or self._live):
                    return
            try:
                for live in arrived:
                    self._live[live.request] = live
                    self._engine.enqueue(live.request)
                self._drop_some()
                begun = time.monotonic()
                if self._live and not self._engine.step():
                    time.sleep(0.001)  # its pages are lent to work outside any request
                self._busy += time.monotonic() - begun
                for request in [request for request, live in self._live.items() if live.deliver()]:
                    del self._live[request]
            except Exception as error:  # whatever it was, those who wait have to hear of it
                self._fail(error)
                return

    def _drop_some(self) -> None:
        """Aborts what nobody wants any more, or wants too late."""
        while self._abandoned:
            request = self._abandoned.popleft()
            self._engine.abort(request)
            self._live.pop(request, None)
        now = time.monotonic()
        for live in [live for live in self._live.values() if live.due <= now]:
            self._engine.abort(live.request)
            del self._live[live.request]
            live.put(DeadlineExceeded("the reply was not complete when its deadline came"))
        if self._ends_at is not None and self._ends_at <= now:
            for request in self._live:
                self._engine.abort(request)

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._failure = error
        for live in (*self._live.values(), *self._arrivals):
            failure = EngineClosed(f"a step failed: {error}")
            failure.__cause__ = error
            live.put(failure)
        self._live.clear()
