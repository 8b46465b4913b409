# SPDX-License-Identifier: Apache-2.0
"""Which tokens the next step computes: admission, pages, prefill chunks and decode, with no array in sight."""

from collections import Counter, deque
from dataclasses import dataclass

from ktx_jax.engine.prefix import PrefixCache
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
      pool: pages of a shard, at least those of one sequence; None for `batch` whole contexts.
    """

    context: int
    batch: int
    page: int = 64
    chunk: int = 512
    tile: int = 16
    growth: int = 4
    stream_above: int | None = None
    shards: int = 1
    pool: int | None = None

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page)

    @property
    def pages(self) -> int:
        """Of a shard."""
        return self.batch * self.pages_per_sequence if self.pool is None else self.pool

    def ladder(self, *, decode: bool) -> list[int]:
        """The lengths that steps are padded to: 1, 2, 4, ... sequences at decode, 16 times `growth`s at prefill."""
        top, size, growth = (self.batch, 1, 2) if decode else (self.chunk, max(self.tile, 16), self.growth)
        lengths = []
        while size < top:
            lengths.append(size)
            size *= growth
        return [*lengths, top]

    def bucket(self, tokens: int, *, decode: bool) -> int:
        """The padded length of a step of so many tokens."""
        ladder = self.ladder(decode=decode)
        return next((length for length in ladder if length >= tokens), ladder[-1])


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
    """What a step computes. `decode`: one token a sequence. `echo`: sequences whose own tokens are asked about."""

    shares: tuple[Share, ...]
    decode: bool
    echo: bool = False

    def streams(self, above: int | None) -> bool:
        """Whether it has part of a prompt of more than `above` tokens."""
        return above is not None and any(len(share.request.prompt) > above for share in self.shares)

    def by_shard(self, shards: int) -> list[list[Share]]:
        """The shares of each shard, in order."""
        return [[share for share in self.shares if share.request.shard == shard] for shard in range(shards)]


class Scheduler:
    """Continuous batching: requests join and leave between steps, in the order they came.

    A request is let in when there are pages for the tokens it has, and grows page by page. Where none is left, the
    youngest request gives all of its own and waits at the head of the queue, to be computed anew.

    Args:
      depth: how many steps may be in flight at once. Chunks of a prompt may follow each other closely; a request whose
        next token is being drawn waits for it.

    Attributes:
      room: the most prompt tokens that a step takes, at most `limits.chunk`: how long newcomers wait at least.
      preemptions: how often a request had to give its pages.
      prompt_tokens: of the requests let in so far; `cached_tokens`: those of them that the prefix cache spared.
      finished: requests that ended.
    """

    def __init__(self, limits: Limits, depth: int = 1):
        self.limits, self.room = limits, limits.chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.pages = [PrefixCache(limits.pages, limits.page) for _ in range(limits.shards)]
        self.preemptions = self.prompt_tokens = self.cached_tokens = self.finished = 0
        self._depth = depth
        self._drawing: set[Request] = set()
        self._last = "decode"
        self._short_last = False

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, running or waiting, and takes its pages back.

        Steps write the cache in the order in which they start, so a step still in flight does no harm to whoever
        gets the pages next.
        """
        request.finish_reason = reason
        self.finished += 1
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def borrow(self, count: int, shard: int = 0) -> list[int] | None:
        """Pages for work outside any request, or None while too few are free."""
        pool = self.pages[shard]
        if count > pool.available:
            return None
        return [page for page in (pool.new() for _ in range(count)) if page is not None]

    def give_back(self, pages: list[int], shard: int = 0) -> None:
        self.pages[shard].release(pages)

    def next_work(self) -> Work | None:
        """The next step, or None when there is nothing to start. Prompts, replies and echoes take turns: none starves.

        Where a step needs no padding, prompts and replies share it.
        """
        self._admit()
        ready = [request for request in self.running if request not in self._drawing]
        echoes = [request for request in ready if request.echo is not None]
        prompts = [request for request in ready if request.echo is None and request.prefilling]
        replies = self._group([request for request in ready if request.echo is None and not request.prefilling])
        together = self.limits.tile == 1 and bool(prompts) and 2 * len(replies) <= self.room
        turns: dict[str, tuple[list[Request], list[Request]]] = {
            "echo": ([], echoes),
            "prefill": (replies if together else [], prompts),
            "decode": ([] if together else replies, []),
        }
        kinds = list(turns)
        first = kinds.index(self._last) + 1
        for kind in kinds[first:] + kinds[:first]:
            one_token, many_tokens = turns[kind]
            shares = self._decodes(one_token)
            shares += self._chunks(many_tokens, shares)
            if shares:
                self._last = kind
                return self._started(Work(tuple(shares), kind == "decode", kind == "echo"))
        return None

    def landed(self, work: Work) -> None:
        """What was in flight has been computed; to be said before the tokens drawn are added."""
        self._drawing.difference_update(share.request for share in work.shares if share.samples)

    def _started(self, work: Work) -> Work:
        for share in work.shares:
            request = share.request
            if share.samples:
                self._drawing.add(request)
            request.computed = share.stop
            # Later steps read what this one writes, so its pages can be shared already.
            full, page = share.stop // self.limits.page, self.limits.page
            if full > request.kept:
                mine = request.pages[:full]
                self.pages[request.shard].keep(request.tokens(request.kept * page, full * page), mine, request.kept)
                request.pages[:full], request.kept = mine, full
        return work

    def _admit(self) -> None:
        while self.waiting and (shard := self._shard_for(self.waiting[0])) is not None:
            request = self.waiting.popleft()
            pool, page = self.pages[shard], self.limits.page
            request.shard, request.pages = shard, pool.hold(request.tokens(0, request.length), self._reusable(request))
            request.kept = len(request.pages)
            request.computed = request.kept * page
            if request.cached is None:
                request.cached = request.computed
                self.prompt_tokens += len(request.prompt)
                self.cached_tokens += request.cached
            self._grow(request, request.length)
            self.running.append(request)

    def _shard_for(self, request: Request) -> int | None:
        """Of the shards with room, the one that knows most of the request's beginning, then that with most pages."""
        tokens, need = request.tokens(0, request.length), -(-request.length // self.limits.page)
        load = Counter(other.shard for other in self.running)
        best = None
        for shard, pool in enumerate(self.pages):
            known, idle = pool.match(tokens, self._reusable(request))
            # A page for each that runs, or whoever comes in would soon be sent out again.
            if load[shard] < self.limits.batch and need - known + load[shard] <= pool.available - idle:
                best = max(best or (-1, -1, -1), (known, pool.available, shard))
        return None if best is None else best[2]

    def _reusable(self, request: Request) -> int:
        """How many of its pages need not be computed: never all, as the last token's logits are wanted."""
        return 0 if request.echo is not None else (request.length - 1) // self.limits.page

    def _grow(self, request: Request, stop: int) -> bool:
        """Gives a request pages up to position `stop`, if need be those of younger ones that are not being drawn."""
        pool = self.pages[request.shard]
        while len(request.pages) * self.limits.page < stop:
            page = pool.new()
            if page is not None:
                request.pages.append(page)
            elif not self._preempt_younger(request):
                return False
        return True

    def _preempt_younger(self, request: Request) -> bool:
        """Sends the youngest out. Not an echo: it has all its pages, is done soon, and could not take answers back."""
        for other in reversed(self.running):
            if other is request:
                return False
            if other.shard == request.shard and other not in self._drawing and other.echo is None:
                self.running.remove(other)
                self._release(other)
                self.waiting.appendleft(other)
                self.preemptions += 1
                return True
        return False

    def _release(self, request: Request) -> None:
        self.pages[request.shard].release(request.pages)
        request.pages, request.kept, request.computed = [], 0, 0

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

    def _decodes(self, replies: list[Request]) -> list[Share]:
        """A token for each reply that has a page for it; the oldest come first, as growing may cost the youngest's."""
        shares = []
        for request in replies:
            if request in self.running and self._grow(request, request.length):
                shares.append(Share(request, request.computed, request.length))
        return shares

    def _chunks(self, prompts: list[Request], beside: list[Share]) -> list[Share]:
        """As much of the prompts as each shard's part of a step holds `beside` others.

        Every second time, those that it can finish go without the longer ones.
        """
        shares, tile = [], self.limits.tile
        prompts = [request for request in prompts if request in self.running]
        taken = Counter(share.request.shard for share in beside)
        room = [self.room - taken[shard] for shard in range(self.limits.shards)]
        short = [r for r in prompts if r.length - r.computed <= room[r.shard]]
        self._short_last = 0 < len(short) < len(prompts) and not self._short_last
        if self._short_last:
            prompts = sorted(short, key=lambda r: r.length - r.computed)
        for request in prompts:
            stop = min(request.length, request.computed + room[request.shard])
            if stop > request.computed:
                shares.append(Share(request, request.computed, stop))
                room[request.shard] -= -(-(stop - request.computed) // tile) * tile
        return shares
