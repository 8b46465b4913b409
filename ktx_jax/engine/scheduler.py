# SPDX-License-Identifier: Apache-2.0
"""Which tokens the next step computes: admission, pages, prefill chunks and decode, with no array in sight."""

from collections import deque
from dataclasses import dataclass

from ktx_jax.engine.requests import FinishReason, Request


@dataclass(frozen=True)
class Limits:
    """Sizes that shape the compiled steps.

    Attributes:
      context: the most tokens of a sequence, prompt and reply together.
      batch: sequences that run at once.
      page: positions in a cache page.
      chunk: the most prompt tokens in a step, padding included.
      tile: a sequence's share of a prefill step is padded to a multiple of this.
      growth: of the lengths of prefill steps, up to `chunk`.
    """

    context: int
    batch: int
    page: int = 64
    chunk: int = 512
    tile: int = 16
    growth: int = 4

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page)

    @property
    def pages(self) -> int:
        return self.batch * self.pages_per_sequence

    def bucket(self, tokens: int, *, decode: bool) -> int:
        """The padded length of a step: a power of two of sequences at decode, `growth` to a power at prefill."""
        top, size, growth = (self.batch, 1, 2) if decode else (self.chunk, max(self.tile, 16), self.growth)
        while size < tokens:
            size *= growth
        return min(size, top)


@dataclass(frozen=True)
class Share:
    """One sequence's part of a step: positions `start` to `stop`; `samples` if the last of them draws a token."""

    request: Request
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == self.request.length


@dataclass(frozen=True)
class Work:
    shares: tuple[Share, ...]
    decode: bool


class Scheduler:
    """Continuous batching: requests join and leave between steps, in the order they came."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_pages = list(range(limits.pages))[::-1]
        self._prefilled_last = False

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, running or waiting, and takes its pages back."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.give_back(request.pages)
        request.pages = []

    def borrow(self, count: int) -> list[int] | None:
        """Pages for work outside any request, or None while too few are free."""
        if count > len(self.free_pages):
            return None
        return [self.free_pages.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self.free_pages.extend(reversed(pages))

    def next_work(self) -> Work | None:
        """The next step, or None when there is nothing to do. Prompts and replies take turns: neither starves."""
        self._admit()
        prompts = [request for request in self.running if request.prefilling]
        replies = [request for request in self.running if not request.prefilling]
        if prompts and not (replies and self._prefilled_last):
            self._prefilled_last = True
            return Work(self._chunks(prompts), decode=False)
        self._prefilled_last = False
        if not replies:
            return None
        return Work(tuple(Share(r, r.computed, r.length) for r in replies), decode=True)

    def _admit(self) -> None:
        """A request gets all the pages it can come to need, so a running one never waits for memory."""
        while self.waiting and len(self.running) < self.limits.batch:
            request = self.waiting[0]
            need = -(-(len(request.prompt) + request.limit) // self.limits.page)
            pages = self.borrow(need)
            if pages is None:
                return
            request.pages = pages
            self.running.append(self.waiting.popleft())

    def _chunks(self, prompts: list[Request]) -> tuple[Share, ...]:
        shares, room, tile = [], self.limits.chunk, self.limits.tile
        for request in prompts:
            if room == 0:
                break
            stop = min(request.length, request.computed + room)
            shares.append(Share(request, request.computed, stop))
            room -= -(-(stop - request.computed) // tile) * tile
        return tuple(shares)
