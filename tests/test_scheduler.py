# SPDX-License-Identifier: Apache-2.0
"""The scheduler alone, driven by random requests: nothing lost, nothing shared, nobody starved."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.requests import Request, SamplingParams
from ktx_jax.engine.scheduler import Limits, Scheduler

LIMITS = st.builds(
    Limits,
    shards=st.integers(1, 3),
    context=st.integers(2, 200),
    batch=st.integers(1, 5),
    page=st.sampled_from([1, 4, 16]),
    chunk=st.sampled_from([4, 16, 64]),
    tile=st.sampled_from([1, 2, 4]),
)


@st.composite
def cases(draw):
    limits = draw(LIMITS)
    lengths = st.integers(1, limits.context - 1).flatmap(
        lambda prompt: st.tuples(st.just(prompt), st.integers(1, limits.context - prompt))
    )
    many = draw(st.lists(lengths, min_size=1, max_size=12))
    return limits, many, draw(st.integers(1, 4)), draw(st.randoms(use_true_random=False))


def check_work(scheduler, work, reached):
    """What has just been started: whole pages of its own for everyone, in order, within the step's size."""
    limits = scheduler.limits
    for shard, shares in enumerate(work.by_shard(limits.shards)):
        assert len(shares) <= limits.batch
        held = [page for request in scheduler.running if request.shard == shard for page in request.pages]
        assert len(held) == len(set(held))
        assert not set(held) & set(scheduler.free_pages[shard])
        padded = 0
        for share in shares:
            assert share.start == reached[share.request] < share.stop <= share.request.length
            assert share.stop <= len(share.request.pages) * limits.page
            assert not work.decode or share.stop - share.start == 1
            padded += 1 if work.decode else -(-(share.stop - share.start) // limits.tile) * limits.tile
            reached[share.request] = share.request.computed
            assert share.request.computed == share.stop
        assert padded <= limits.bucket(padded, decode=work.decode) <= max(limits.chunk, limits.batch)
    assert work.shares


@given(cases())
@settings(max_examples=200, deadline=None)
def test_every_request_is_computed_once_and_pages_return(case):
    limits, lengths, depth, random = case
    scheduler, flight = Scheduler(limits, depth), deque()
    requests = [Request([1] * prompt, SamplingParams(), limit) for prompt, limit in lengths]
    for request in requests:
        scheduler.add(request)
    aborted = {r for r in requests if random.random() < 0.15}
    steps = 0
    reached = dict.fromkeys(requests, 0)
    while True:
        while len(flight) < depth and (work := scheduler.next_work()) is not None:
            flight.append(work)
            check_work(scheduler, work, reached)
        if not flight:
            break
        steps += 1
        assert steps < 10_000
        work = flight.popleft()
        scheduler.landed(work)
        for share in work.shares:
            if share.samples and share.request.finish_reason is None:
                share.request.output.append(7)
                if len(share.request.output) == share.request.limit:
                    scheduler.finish(share.request, "length")
        for request in [r for r in aborted if r.finish_reason is None and random.random() < 0.3]:
            scheduler.finish(request, "abort")
    assert [sorted(free) for free in scheduler.free_pages] == [list(range(limits.pages))] * limits.shards
    for request in requests:
        assert request.finish_reason == "length" or request in aborted
        if request.finish_reason == "length":
            assert len(request.output) == request.limit
            assert request.computed == request.length - 1


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
