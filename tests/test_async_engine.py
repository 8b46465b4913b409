# SPDX-License-Identifier: Apache-2.0
"""`AsyncEngine`: many tasks at once, on the embedded model."""

import asyncio
import contextlib
import gc
import random
import threading
import time
from importlib.resources import files
from typing import Any

import ktx_ffi
import numpy as np
import pytest

from ktx_jax import LLM, AsyncEngine, DeadlineExceeded, EngineClosed, Grammar, KtxError, QueueFull, SamplingParams

pytestmark = pytest.mark.skipif(not ktx_ffi.available(), reason="equal to the bit only with the CPU kernels")

MODEL = str(files("ktx_jax") / "data" / "tiny-q8_0.gguf")
ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
LONG_AGO = 60.0  # seconds that nothing here should come near


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Room for two contexts, shared by four."""
    return LLM(MODEL, context=256, batch=4, cache_tokens=512, implementation="ffi")


@pytest.fixture(scope="module")
def alone() -> LLM:
    """The same model, asked one thing at a time."""
    return LLM(MODEL, context=256, batch=1, implementation="ffi")


@pytest.fixture
def run(llm):
    """Runs a test of an engine in an event loop; afterwards every page is free."""

    def run(test, **options):
        async def main():
            engine = AsyncEngine(llm, **options)
            try:
                return await asyncio.wait_for(test(engine), 10 * LONG_AGO)
            finally:
                await engine.close(0)

        result = asyncio.run(main())
        scheduler = llm._engine._scheduler
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.pages[0].available == scheduler.limits.pages
        return result

    return run


@pytest.fixture
def slow(llm, monkeypatch):
    """A whole context takes five seconds."""
    step = llm._engine.step
    monkeypatch.setattr(llm._engine, "step", lambda: (time.sleep(0.02), step())[1])


async def whole(stream):
    """A reply's text, tokens and finish reason."""
    chunks = [chunk async for chunk in stream]
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].finish_reason


async def until(condition):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < LONG_AGO
        await asyncio.sleep(0.005)


def asks(llm, count, seed):
    """Prompts and how they are to be continued, some of which begin alike."""
    rng = random.Random(seed)
    for i in range(count):
        common = [0, *range(40, 40 + 70 * rng.randrange(3))]
        prompt = common + [rng.randrange(4, llm.config.vocab_size) for _ in range(rng.randrange(1, 60))]
        how: dict[str, Any] = {"temperature": 0} if i % 2 else {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if i % 7 == 0:
            how["grammar"] = Grammar.from_regex(r"[a-z ]{3,60}", llm.tokenizer)
        if i % 5 == 0:
            how |= {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": {5: -3.0}}
        yield prompt, SamplingParams(max_tokens=rng.randrange(1, 50), logprobs=i % 3 or None, **how)


def test_many_streams_that_come_and_go(llm, alone, run, compilations):
    """Those that end are as if they had been alone, whoever left beside them; after a warm-up, nothing is compiled."""
    rng = random.Random(4)

    async def one(engine, prompt, params):
        await asyncio.sleep(rng.random())
        fate = rng.random()
        if fate < 0.6:
            return await whole(engine.generate(prompt, params))
        if fate < 0.8:  # the client goes
            async with contextlib.aclosing(engine.generate(prompt, params)) as stream:
                left = rng.randrange(8)
                async for _ in stream:
                    if (left := left - 1) < 0:
                        return None
            return None
        task = asyncio.create_task(whole(engine.generate(prompt, params)))
        await asyncio.sleep(rng.random() / 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None

    async def test(engine):
        asked = list(asks(llm, 64, seed=2))
        compilations()
        engine.warm_up()
        assert compilations() > 0
        replies, _ = await asyncio.gather(
            asyncio.gather(*[one(engine, *ask) for ask in asked]),
            asyncio.gather(*[engine.score_prompt(prompt, 2) for prompt, _ in asked[::5]]),
        )
        await until(lambda: engine.stats().running == 0)
        return asked, replies

    asked, replies = run(test, max_queue=96)
    assert compilations() == 0
    ended = [(ask, reply) for ask, reply in zip(asked, replies, strict=True) if reply is not None]
    assert len(ended) > 25
    for (prompt, params), reply in ended:
        [truth] = alone.generate(prompt, params)
        assert reply == (truth.text, truth.token_ids, truth.finish_reason)
    assert llm._engine.stats().cached_tokens > 0


def test_leaving_frees_pages_at_once(run, slow):
    async def test(engine):
        def idle():
            stats = engine.stats()
            return stats.running == stats.waiting == 0 and stats.pages_free == stats.pages_total

        for leave in ("close", "cancel", "drop", "with"):
            stream = engine.generate([0, 5, 6], ENDLESS)
            await anext(stream)
            request = stream.request
            assert engine.stats().running == 1
            if leave == "close":
                await stream.aclose()
                assert [chunk async for chunk in stream] == []
            elif leave == "cancel":
                task = asyncio.create_task(whole(stream))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
            elif leave == "with":
                async with stream:
                    pass
            del stream
            gc.collect()
            await until(idle)
            assert request.finish_reason == "abort"

    run(test)


def test_a_full_queue_refuses(run):
    async def test(engine):
        running = [engine.generate([0, 5 + i], ENDLESS) for i in range(4)]
        await asyncio.gather(*map(anext, running))
        waiting = [engine.generate([0, 9], ENDLESS) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait") as refusal:
            engine.generate([0, 10])
        assert refusal.value.retry_after >= 1
        with pytest.raises(QueueFull):
            await engine.score_prompt([0, 10])
        assert engine.stats().waiting == 2
        await running[0].aclose()
        assert (await anext(waiting[0])).token_ids
        for stream in (*running, *waiting):
            await stream.aclose()

    run(test, max_queue=2)


def test_a_deadline_ends_a_reply_that_runs_or_waits(run, slow):
    async def test(engine):
        streams = [engine.generate([0, 5 + i], ENDLESS, deadline=LONG_AGO) for i in range(4)]
        await asyncio.gather(*map(anext, streams))
        with pytest.raises(DeadlineExceeded):
            await whole(engine.generate([0, 9], ENDLESS, deadline=0.0))
        with pytest.raises(DeadlineExceeded):
            await engine.score_prompt([0, 9], deadline=0.0)
        for stream in streams:
            await stream.aclose()
        with pytest.raises(DeadlineExceeded):
            await whole(engine.generate([0, 5], ENDLESS, deadline=0.5))

    run(test)


def test_closing_lets_replies_finish_within_the_grace(llm, slow):
    async def main():
        engine = AsyncEngine(llm)
        short = asyncio.create_task(whole(engine.generate([0, 5], SamplingParams(max_tokens=20, ignore_eos=True))))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(engine.close(LONG_AGO))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineClosed, match="shutting down"):
            engine.generate([0, 6])
        _, tokens, reason = await short
        await closing
        assert (len(tokens), reason) == (20, "length")

        engine = AsyncEngine(llm)
        stream = engine.generate([0, 5], ENDLESS)
        await anext(stream)
        await engine.close(0.0)
        *_, last = [chunk async for chunk in stream]
        assert last.finish_reason == "abort"
        assert not engine._thread.is_alive()

    asyncio.run(main())


def test_bad_requests_are_refused_before_they_wait(run):
    async def test(engine):
        for prompt, params, message in [
            ([], None, "empty"),
            ([0] * 300, None, "has 300 tokens"),
            ([0, 99999], None, "the prompt: token id 99999 is outside"),
            ([0], SamplingParams(logit_bias={99999: 1}), "logit_bias: token id 99999"),
            ([0], SamplingParams(stop_token_ids=[99999]), "stop_token_ids: token id 99999"),
        ]:
            with pytest.raises(KtxError, match=message):
                engine.generate(prompt, params)
        with pytest.raises(KtxError, match="empty"):
            await engine.score_prompt([])
        with pytest.raises(KtxError, match="top should be 0 to 20"):
            await engine.score_prompt([0, 5], 21)

    run(test)


def test_scores_of_a_prompt(llm, alone, run):
    prompt = [0, *range(30, 180)]

    async def test(engine):
        reply = asyncio.create_task(whole(engine.generate([0, 5], ENDLESS)))  # steps are shared out between both
        scores, again = await asyncio.gather(engine.score_prompt(prompt, 3), engine.score_prompt(prompt))
        await reply
        return scores, again

    scores, again = run(test)
    logits = np.float64(alone.logits(prompt))
    truth = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    assert scores[0] is None
    assert again[0] is None
    assert len(scores) == len(prompt)
    for at, entry in enumerate(scores[1:], start=1):
        assert entry.token_id == prompt[at]
        np.testing.assert_allclose(entry.logprob, truth[at - 1, prompt[at]], atol=1e-4)
        ids, values = zip(*entry.top, strict=True)
        np.testing.assert_allclose(values, np.sort(truth[at - 1])[::-1][:3], atol=1e-4)
        np.testing.assert_allclose(values, truth[at - 1, list(ids)], atol=1e-4)
        assert (again[at].logprob, again[at].top) == (entry.logprob, ())


def test_a_second_turn_computes_only_what_is_new(llm, alone, run):
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    first = [0, *range(100, 230)]

    async def test(engine):
        before = engine.stats()
        _, tokens, _ = await whole(engine.generate(first, params))
        second = [*first, *tokens, 5, 6, 7]
        stream = engine.generate(second, params)
        reply = await whole(stream)
        after = engine.stats()
        assert after.prompt_tokens - before.prompt_tokens == len(first) + len(second)
        return second, stream.cached_tokens, reply

    second, cached, reply = run(test)
    assert cached == 128  # two whole pages
    [truth] = alone.generate(second, params)
    assert reply == (truth.text, truth.token_ids, truth.finish_reason)


def test_event_loops_of_several_threads_and_the_model_itself(llm, alone, run):
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    prompts = [[0, 20 + i] for i in range(6)]
    truths = [alone.generate(prompt, params)[0].token_ids for prompt in prompts]
    replies: dict[int, tuple] = {}

    async def test(engine):
        async def ask(i):
            return await whole(engine.generate(prompts[i], params))

        def thread(i):
            replies[i] = asyncio.run(ask(i))[1] if i % 2 else llm.generate(prompts[i], params)[0].token_ids

        threads = [threading.Thread(target=thread, args=(i,)) for i in range(6)]
        for each in threads:
            each.start()
        await asyncio.to_thread(lambda: [each.join() for each in threads])

    run(test)
    assert [replies[i] for i in range(6)] == truths


def test_nothing_is_computed_while_there_is_nothing_to_do(run):
    async def test(engine):
        await whole(engine.generate([0, 5], SamplingParams(max_tokens=2)))
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.1

    run(test)


def test_a_failed_step_is_told_to_all(llm, monkeypatch):
    async def main():
        engine = AsyncEngine(llm)
        stream = engine.generate([0, 5], ENDLESS)
        await anext(stream)
        monkeypatch.setattr(llm._engine, "step", lambda: 1 / 0)
        with pytest.raises(EngineClosed, match="division by zero"):
            await whole(stream)
        with pytest.raises(EngineClosed, match="division by zero"):
            engine.generate([0, 5])
        await engine.close(0)
        monkeypatch.undo()
        llm._engine.abort(stream.request)

    asyncio.run(main())


@pytest.mark.parametrize("options", [{"max_queue": 0}, {"chunk": 0}])
def test_bad_options(llm, options):
    with pytest.raises(KtxError, match=next(iter(options))):
        AsyncEngine(llm, **options)
