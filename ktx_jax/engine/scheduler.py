# SPDX-License-Identifier: Apache-2.0
"""Which tokens the next step computes: admission, pages, prefill chunks and decode, with no array in sight."""

from collections import Counter, deque
from dataclasses import dataclass

from ktx_jax.engine.requests import FinishReason, Request


@dataclass(frozen=True)
class Limits:
    """Sizes that shape the compiled steps.

    Attributes:
      context: the most tokens of a sequence, prompt and reply together.
      batch: sequences that run at once in a shard.
      page: positions in a cache page.
      chunk: the most prompt tokens in a step, padding included.
      tile: a sequence's share of a prefill step is padded to a multiple of this.
      growth: of the lengths of prefill steps, up to `chunk`.
      stream_above: prompts of more tokens are prefilled with streamed weights; None for never.
      shards: of the `data` axis. Each has pages of its own, and a request stays in its shard.
    """

    context: int
    batch: int
    page: int = 64
    chunk: int = 512
    tile: int = 16
    growth: int = 4
    stream_above: int | None = None
    shards: int = 1

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page)

    @property
    def pages(self) -> int:
        """Of a shard."""
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

    def streams(self, above: int | None) -> bool:
        """Whether it has part of a prompt of more than `above` tokens."""
        return above is not None and any(len(share.request.prompt) > above for share in self.shares)

    def by_shard(self, shards: int) -> list[list[Share]]:
        """The shares of each shard, in order."""
        return [[share for share in self.shares if share.request.shard == shard] for shard in range(shards)]


class Scheduler:
    """Continuous batching: requests join and leave between steps, in the order they came.

    Args:
      depth: how many steps may be in flight at once. Chunks of a prompt may follow each other closely; a request whose
        next token is being drawn waits for it.
    """

    def __init__(self, limits: Limits, depth: int = 1):
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_pages = [list(range(limits.pages))[::-1] for _ in range(limits.shards)]
        self._depth = depth
        self._drawing: set[Request] = set()
        self._prefilled_last = False

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, running or waiting, and takes its pages back.

        Steps write the cache in the order in which they start, so a step still in flight does no harm to whoever
        gets the pages next.
        """
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.give_back(request.pages, request.shard)
        request.pages = []

    def borrow(self, count: int, shard: int = 0) -> list[int] | None:
        """Pages for work outside any request, or None while too few are free."""
        free = self.free_pages[shard]
        if count > len(free):
            return None
        return [free.pop() for _ in range(count)]

    def give_back(self, pages: list[int], shard: int = 0) -> None:
        self.free_pages[shard].extend(reversed(pages))

    def next_work(self) -> Work | None:
        """The next step, or None when there is nothing to start. Prompts and replies take turns: neither starves."""
        self._admit()
        ready = [request for request in self.running if request not in self._drawing]
        prompts = [request for request in ready if request.prefilling]
        replies = [request for request in ready if not request.prefilling]
        if prompts and not (replies and self._prefilled_last):
            self._prefilled_last = True
            work = Work(self._chunks(prompts), decode=False)
        elif replies:
            self._prefilled_last = False
            work = Work(tuple(Share(r, r.computed, r.length) for r in self._group(replies)), decode=True)
        else:
            return None
        self._drawing.update(share.request for share in work.shares if share.samples)
        for share in work.shares:
            share.request.computed = share.stop
        return work

    def landed(self, work: Work) -> None:
        """What was in flight has been computed; to be said before the tokens drawn are added."""
        self._drawing.difference_update(share.request for share in work.shares if share.samples)

    def _admit(self) -> None:
        """A request gets all the pages it can come to need, so a running one never waits for memory."""
        while self.waiting:
            shard = self._emptiest()
            if shard is None:
                return
            request = self.waiting[0]
            pages = self.borrow(-(-(len(request.prompt) + request.limit) // self.limits.page), shard)
            if pages is None:
                return
            request.pages, request.shard = pages, shard
            self.running.append(self.waiting.popleft())

    def _emptiest(self) -> int | None:
        """The shard with the most free pages of those that take another sequence."""
        load = Counter(request.shard for request in self.running)
        open_shards = [shard for shard in range(self.limits.shards) if load[shard] < self.limits.batch]
        return max(open_shards, key=lambda shard: len(self.free_pages[shard]), default=None)

    def _group(self, replies: list[Request]) -> list[Request]:
        """Those that decode together: all, or where several steps are in flight, an even part of each shard's."""
        most = -(-self.limits.batch // self._depth)
        taken: Counter[int] = Counter()
        group = []
        for request in replies:
            if taken[request.shard] < most:
                taken[request.shard] += 1
                group.append(request)
        return group

    def _chunks(self, prompts: list[Request]) -> tuple[Share, ...]:
        """As much of the prompts as each shard's part of a step holds."""
        shares, tile = [], self.limits.tile
        room = [self.limits.chunk] * self.limits.shards
        for request in prompts:
            stop = min(request.length, request.computed + room[request.shard])
            if stop > request.computed:
                shares.append(Share(request, request.computed, stop))
                room[request.shard] -= -(-(stop - request.computed) // tile) * tile
        return tuple(shares)
