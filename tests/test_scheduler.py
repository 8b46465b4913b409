# SPDX-License-Identifier: Apache-2.0
"""The scheduler alone, driven by random requests: nothing lost, nothing shared, nobody starved."""

from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.requests import Echo, Request, SamplingParams
from ktx_jax.engine.scheduler import Limits, Scheduler


@st.composite
def limits(draw):
    sizes = {
        "context": draw(st.integers(2, 200)),
        "batch": draw(st.integers(1, 5)),
        "page": draw(st.sampled_from([1, 4, 16])),
        "chunk": draw(st.sampled_from([4, 16, 64])),
        "tile": draw(st.sampled_from([1, 2, 4])),
        "shards": draw(st.integers(1, 3)),
    }
    whole = Limits(**sizes)
    return Limits(**sizes, pool=draw(st.integers(whole.pages_per_sequence, whole.pages)))


@st.composite
def cases(draw):
    chosen = draw(limits())
    lengths = st.integers(1, chosen.context - 1).flatmap(
        lambda prompt: st.tuples(st.just(prompt), st.integers(0, chosen.context - prompt))
    )
    many = draw(st.lists(lengths, min_size=1, max_size=12))
    return chosen, many, draw(st.integers(1, 4)), draw(st.randoms(use_true_random=False))


class Cache:
    """What the steps would have written: of each page, the text up to each of its positions."""

    def __init__(self, limits):
        self.limits, self.rows, self.echoed = limits, {}, Counter()

    def place(self, request, at):
        return request.shard, request.pages[at // self.limits.page], at % self.limits.page

    def run(self, work):
        """A step in which all rows are written before any is read."""
        for share in work.shares:
            if share.request.echo is not None:
                self.echoed.update((share.request, at) for at in range(share.start, share.stop))
            for at in range(share.start, share.stop):
                self.rows[self.place(share.request, at)] = tuple(share.request.tokens(0, at + 1))
        for share in work.shares:
            text = share.request.tokens(0, share.stop)
            for at in range(share.stop):
                assert self.rows[self.place(share.request, at)] == tuple(text[: at + 1])


def check_work(scheduler, work):
    """What has just been started: pages for everyone, nobody twice, within the step's size."""
    limits = scheduler.limits
    assert work.shares
    assert len({share.request for share in work.shares}) == len(work.shares)
    for shard, shares in enumerate(work.by_shard(limits.shards)):
        assert len(shares) <= limits.batch
        held = Counter(page for request in scheduler.running if request.shard == shard for page in request.pages)
        assert scheduler.pages[shard].available == limits.pages - len(held)
        padded = 0
        for share in shares:
            request = share.request
            assert request in scheduler.running
            assert 0 <= share.start < share.stop == request.computed <= request.length
            assert share.stop <= len(request.pages) * limits.page
            assert not work.decode or share.stop - share.start == 1
            assert work.echo == (request.echo is not None)
            padded += 1 if work.decode else -(-(share.stop - share.start) // limits.tile) * limits.tile
        assert padded <= limits.bucket(padded, decode=work.decode) <= max(limits.chunk, limits.batch)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_every_request_is_computed_and_pages_return(case):
    limits, lengths, depth, random = case
    scheduler, cache, flight = Scheduler(limits, depth), Cache(limits), deque()
    requests = []
    for prompt, limit in lengths:
        text = [random.randrange(2) if random.random() < 0.1 else 0 for _ in range(prompt)]
        requests.append(Request(text, SamplingParams(), limit, echo=None if limit else Echo(0)))
        scheduler.add(requests[-1])
    aborted = [r for r in requests if random.random() < 0.15]  # in order: what is drawn must not depend on hashes
    steps = 0
    while True:
        while len(flight) < depth and (work := scheduler.next_work()) is not None:
            assert not {share.request for share in work.shares} & {r for w in flight for r in drawing(w)}
            flight.append(work)
            check_work(scheduler, work)
            cache.run(work)
        if not flight:
            break
        steps += 1
        assert steps < 10_000
        work = flight.popleft()
        scheduler.landed(work)
        for request in drawing(work):
            if request.finish_reason is None:
                assert request in scheduler.running  # nobody is sent out while a token is drawn for it
                if request.echo is None:
                    request.output.append(random.randrange(2))
                if len(request.output) == request.limit:
                    scheduler.finish(request, "length")
        for request in [r for r in aborted if r.finish_reason is None and random.random() < 0.3]:
            scheduler.finish(request, "abort")
    assert [pool.available for pool in scheduler.pages] == [limits.pages] * limits.shards
    for request in requests:
        assert request.finish_reason == "length" or request in aborted
        if request.finish_reason == "length":
            assert len(request.output) == request.limit
        if request.finish_reason == "length" and request.echo is not None:
            assert [cache.echoed[request, at] for at in range(request.length)] == [1] * request.length
    assert scheduler.finished == len(requests)


def drawing(work):
    return [share.request for share in work.shares if share.samples]


def run_to_the_end(scheduler, *, until=lambda: False):
    """Steps until nothing is left; the kinds of work."""
    kinds = []
    while not until() and (work := scheduler.next_work()) is not None:
        kinds.append(work)
        scheduler.landed(work)
        for request in drawing(work):
            request.output.append(7)
            if len(request.output) == request.limit:
                scheduler.finish(request, "length")
    return kinds


def test_the_youngest_gives_way_and_is_computed_anew():
    scheduler = Scheduler(Limits(context=16, batch=3, page=4, chunk=16, tile=1, pool=6))
    requests = [Request([i] * 3, SamplingParams(), 12) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    order = []
    while scheduler.next_work is not None and (work := scheduler.next_work()) is not None:
        scheduler.landed(work)
        for request in drawing(work):
            request.output.append(7)
            if len(request.output) == request.limit:
                scheduler.finish(request, "length")
                order.append(requests.index(request))
    assert order == [0, 1, 2]
    assert scheduler.preemptions > 0
    assert all(len(request.output) == 12 for request in requests)


def test_a_second_turn_computes_only_what_is_new():
    scheduler = Scheduler(Limits(context=4096, batch=2, page=64, chunk=512, tile=1))
    first = Request(list(range(1500)), SamplingParams(), 40)
    scheduler.add(first)
    run_to_the_end(scheduler)
    text = first.tokens(0, first.length)
    second = Request([*text, *range(30)], SamplingParams(), 1)
    scheduler.add(second)
    [work] = run_to_the_end(scheduler)
    [share] = work.shares
    # All whole pages of what has been computed: the last token drawn has not been.
    assert share.start == second.cached == (len(text) - 1) // 64 * 64
    assert share.stop - share.start < 64 + 30 + 1
    assert (scheduler.prompt_tokens, scheduler.cached_tokens) == (1500 + len(second.prompt), second.cached)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """It gets the second step after it comes, and replies a token in each step."""
    scheduler = Scheduler(Limits(context=4096, batch=3, page=64, chunk=128, tile=1))
    reply, long, short = (Request([i] * n, SamplingParams(), 50) for i, n in enumerate((4, 2048, 60)))
    scheduler.add(reply)
    scheduler.next_work()
    reply.output.append(7)
    scheduler._drawing.clear()
    scheduler.add(long)
    sizes = []
    for step in range(8):
        if step == 3:
            scheduler.add(short)
        work = scheduler.next_work()
        scheduler.landed(work)
        sizes.append({share.request: share.stop - share.start for share in work.shares})
        for request in drawing(work):
            request.output.append(7)
    assert [size.get(reply) for size in sizes] == [1] * 8
    assert [size.get(long) for size in sizes] == [127, 127, 127, None, 126, 126, 126, 126]
    assert [size.get(short) for size in sizes] == [None, None, None, 60, 1, 1, 1, 1]


def test_buckets_are_few():
    limits = Limits(context=4096, batch=8)
    assert {limits.bucket(n, decode=False) for n in range(1, 513)} == {16, 64, 256, 512}
    assert {limits.bucket(n, decode=True) for n in range(1, 9)} == {1, 2, 4, 8}


def test_replies_go_on_while_a_long_prompt_is_read():
    scheduler = Scheduler(Limits(context=64, batch=2, page=4, chunk=4, tile=4))
    first = Request([1], SamplingParams(), 20)
    scheduler.add(first)
    kinds = []
    for step in range(12):
        if step == 2:
            scheduler.add(Request([1] * 30, SamplingParams(), 4))
        work = scheduler.next_work()
        kinds.append(work.decode)
        scheduler.landed(work)
        for share in work.shares:
            if share.samples:
                share.request.output.append(7)
    assert kinds == [False, True, False, True, False, True, False, True, False, True, False, True]
