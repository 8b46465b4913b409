# SPDX-License-Identifier: Apache-2.0
"""The scheduler alone, driven by random requests: nothing lost, nothing shared, nobody starved."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.requests import Request, SamplingParams
from ktx_jax.engine.scheduler import Limits, Scheduler

LIMITS = st.builds(
    Limits,
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
    return limits, draw(st.lists(lengths, min_size=1, max_size=12)), draw(st.randoms(use_true_random=False))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_every_request_is_computed_once_and_pages_return(case):
    limits, lengths, random = case
    scheduler = Scheduler(limits)
    requests = [Request([1] * prompt, SamplingParams(), limit) for prompt, limit in lengths]
    for request in requests:
        scheduler.add(request)
    aborted = {r for r in requests if random.random() < 0.15}
    steps = 0
    while (work := scheduler.next_work()) is not None:
        steps += 1
        assert steps < 10_000
        assert 0 < len(work.shares) <= limits.batch
        held = [page for request in scheduler.running for page in request.pages]
        assert len(held) == len(set(held))
        assert not set(held) & set(scheduler.free_pages)
        padded = 0
        for share in work.shares:
            assert share.start == share.request.computed < share.stop <= share.request.length
            assert share.stop <= len(share.request.pages) * limits.page
            assert not work.decode or share.stop - share.start == 1
            padded += 1 if work.decode else -(-(share.stop - share.start) // limits.tile) * limits.tile
        assert padded <= limits.bucket(padded, decode=work.decode) <= max(limits.chunk, limits.batch)
        for share in work.shares:
            share.request.computed = share.stop
            if share.samples:
                share.request.output.append(7)
                if len(share.request.output) == share.request.limit:
                    scheduler.finish(share.request, "length")
        for request in [r for r in aborted if r.finish_reason is None and random.random() < 0.3]:
            scheduler.finish(request, "abort")
    assert sorted(scheduler.free_pages) == list(range(limits.pages))
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
        for share in work.shares:
            share.request.computed = share.stop
            if share.samples:
                share.request.output.append(7)
    assert kinds == [False, True, False, True, False, True, False, True, False, True, False, True]
