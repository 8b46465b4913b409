# SPDX-License-Identifier: Apache-2.0
"""`LLM`: replies whole and streamed, why they end, and that they never depend on their neighbours."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from golden_models import SMALL_LIMITS, small_llm

from ktx_jax.errors import KtxError
from ktx_jax.llm import LLM, SamplingParams

CONTEXT = SMALL_LIMITS.context
PROMPT = [0, 5, 6]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
WILD = {"temperature": 1.0, "top_p": 1.0}
MESSAGES = [{"role": "user", "content": "the tin"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small_llm()


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    """After each test every page is free and no request waits or runs."""
    yield
    scheduler = llm._engine._scheduler
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pages[0].available == scheduler.limits.pages


def one(llm, prompt=PROMPT, **params):
    [reply] = llm.generate(prompt, SamplingParams(**params))
    return reply


def ended_by_eos(llm) -> tuple[int, list[int]]:
    """A seed whose reply meets the end token, and that reply's tokens."""
    for seed in range(100):
        reply = one(llm, max_tokens=100, seed=seed, **WILD)
        if reply.finish_reason == "stop":
            return seed, list(reply.token_ids)
    pytest.fail("no reply met the end token")


def test_end_token_stops(llm):
    seed, ids = ended_by_eos(llm)
    assert ids[-1] == llm.tokenizer.eos_id
    assert llm.tokenizer.eos_id not in ids[:-1]
    params = SamplingParams(max_tokens=len(ids) + 5, seed=seed, ignore_eos=True, **WILD)
    [on] = llm.generate(PROMPT, params)
    assert on.finish_reason == "length"
    assert list(on.token_ids[: len(ids)]) == ids
    assert len(on.token_ids) == len(ids) + 5


def test_end_token_on_the_last_place_is_a_stop(llm):
    seed, ids = ended_by_eos(llm)
    assert one(llm, max_tokens=len(ids), seed=seed, **WILD).finish_reason == "stop"
    assert one(llm, max_tokens=len(ids) - 1, seed=seed, **WILD).finish_reason == "length"


def test_length(llm):
    reply = one(llm, max_tokens=5, temperature=0)
    assert (reply.finish_reason, len(reply.token_ids), reply.prompt_tokens) == ("length", 5, 3)
    assert reply.text == llm.tokenizer.decode(reply.token_ids)


def test_full_context_is_a_length(llm):
    for limit in (None, 10_000):
        reply = one(llm, max_tokens=limit, temperature=0, ignore_eos=True)
        assert reply.finish_reason == "length"
        assert len(reply.token_ids) == CONTEXT - len(PROMPT)
    assert len(one(llm, [7] * (CONTEXT - 1), max_tokens=None, temperature=0).token_ids) == 1


def test_stop_text(llm):
    [free] = llm.generate(PROMPT, GREEDY)
    for start, end in ((0, 1), (4, 7), (9, 12)):
        stop = free.text[start:end]
        reply = one(llm, max_tokens=24, temperature=0, ignore_eos=True, stop=["never in it", stop])
        assert reply.finish_reason == "stop"
        assert reply.text == free.text[: free.text.index(stop)]
        assert reply.token_ids == free.token_ids[: len(reply.token_ids)]
    # What only begins like a stop text is given in the end.
    reply = one(llm, max_tokens=24, temperature=0, ignore_eos=True, stop=free.text[-1] + "x")
    assert (reply.text, reply.finish_reason) == (free.text, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * CONTEXT, f"has {CONTEXT} tokens; a context of {CONTEXT} holds at most {CONTEXT - 1}"),
        ("a" * 500, "raise `context`, or shorten"),
        ([], "empty"),
        ([3, -1], "token id -1 is outside the vocabulary of 256"),
        ([256], "token id 256 is outside"),
    ],
)
def test_a_bad_prompt_is_an_error_before_any_work(llm, prompt, message, monkeypatch):
    monkeypatch.setattr(llm._engine, "_start", lambda work: pytest.fail("a step was computed"))
    with pytest.raises(KtxError, match=message):
        llm.generate([PROMPT, prompt], GREEDY)
    with pytest.raises(KtxError, match=message):
        llm.stream(prompt, GREEDY)


def test_logits_takes_a_full_context_and_no_more(llm):
    assert llm.logits([7] * CONTEXT).shape == (CONTEXT, 256)
    with pytest.raises(KtxError, match="161 tokens"):
        llm.logits([7] * (CONTEXT + 1))
    with pytest.raises(KtxError, match="empty"):
        llm.logits([])


def test_no_prompts_no_replies(llm):
    assert llm.generate([]) == []


def test_prompts_as_text_or_ids(llm):
    text = "the tin on a"
    ids = llm.tokenizer.encode(text)
    assert ids[0] == llm.tokenizer.bos_id
    replies = llm.generate([text, ids], GREEDY)
    assert replies[0] == replies[1]
    assert llm.generate(text, GREEDY) == llm.generate(ids, GREEDY) == replies[:1]
    np.testing.assert_array_equal(llm.logits(text), llm.logits(ids))


def test_batched_and_single_prompts_agree(llm):
    prompts = [[0, *range(5, 5 + n)] for n in (1, 14, 3, 15, 40)]  # more than the batch of 2
    together = llm.generate(prompts, GREEDY)
    assert together == [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert together == llm.generate(prompts, GREEDY)


def test_seeds(llm):
    def ids(seed):
        return one(llm, max_tokens=12, seed=seed, ignore_eos=True, **WILD).token_ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(2**63 + 1) != ids(1)
    assert ids(None) != ids(None)
    both = llm.generate([[0, 9], PROMPT], SamplingParams(max_tokens=12, seed=1, ignore_eos=True, **WILD))
    assert both[1].token_ids == ids(1)


def test_logprobs(llm):
    for temperature in (0.0, 1.0):
        reply = one(llm, max_tokens=8, temperature=temperature, seed=3, logprobs=5, ignore_eos=True)
        logits = llm.logits(PROMPT + list(reply.token_ids))[len(PROMPT) - 1 : -1]
        truth = np.asarray(jax.nn.log_softmax(logits))
        assert len(reply.logprobs) == len(reply.token_ids) == 8
        for row, token, entry in zip(truth, reply.token_ids, reply.logprobs, strict=True):
            assert entry.token_id == token
            np.testing.assert_allclose(entry.logprob, row[token], atol=1e-4)
            ids, values = zip(*entry.top, strict=True)
            np.testing.assert_allclose(values, np.sort(row)[::-1][:5], atol=1e-4)
            np.testing.assert_allclose(values, row[list(ids)], atol=1e-4)
            assert temperature or (token, entry.logprob) == entry.top[0]
    assert one(llm, max_tokens=3).logprobs is None
    bare = one(llm, max_tokens=3, temperature=0, logprobs=0)
    assert [entry.top for entry in bare.logprobs] == [()] * 3


def test_stream_joins_to_the_whole(llm):
    for params in (GREEDY, SamplingParams(max_tokens=60, seed=4, logprobs=2, **WILD)):
        [whole] = llm.generate(PROMPT, params)
        chunks = list(llm.stream(PROMPT, params))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert tuple(i for chunk in chunks for i in chunk.token_ids) == whole.token_ids
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == whole.finish_reason
        assert sum(len(chunk.logprobs) for chunk in chunks) == len(whole.logprobs or ())


def test_closed_streams_leave_nothing(llm):
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    assert llm._engine._scheduler.running
    stream.close()
    assert not llm._engine._scheduler.running
    llm.stream(PROMPT, GREEDY).close()  # never started


def test_interleaved_streams(llm):
    prompts = [PROMPT, [0, 40, 41, 42], [0, 77]]  # one more than the batch
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    while streams_left := [i for i, got in enumerate(ids) if len(got) < 24]:
        for i in streams_left:
            ids[i].extend(next(streams[i]).token_ids)
        llm.logits(PROMPT)
    assert ids == [list(llm.generate(prompt, GREEDY)[0].token_ids) for prompt in prompts]
    for stream in streams:
        stream.close()


def test_a_request_ended_from_elsewhere(llm):
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    [request] = llm._engine._scheduler.running
    llm._engine.abort(request)
    rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    assert rest[-1].token_ids == ()


def test_threads(llm):
    prompts = [[0, *range(5, 6 + n)] for n in range(6)]
    alone = [llm.generate(prompt, GREEDY) for prompt in prompts]
    logits = llm.logits(PROMPT)
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(llm.generate, prompt, GREEDY) for prompt in prompts]
        others = [pool.submit(llm.logits, PROMPT) for _ in range(3)]
        assert [reply.result() for reply in replies] == alone
        for other in others:
            np.testing.assert_array_equal(other.result(), logits)


def test_nothing_is_compiled_once_warm(llm, compilations):
    def work(shift):
        prompts = [[0, *range(shift, shift + 4)], [0, *range(shift, shift + 9)]]
        llm.generate(prompts, SamplingParams(max_tokens=6, temperature=0.1 * shift, seed=shift, ignore_eos=True))

    work(3)
    compilations()
    for shift in range(4, 9):
        work(shift)
    assert compilations() == 0


def test_chat(llm):
    ids = llm.encode_chat(MESSAGES)
    assert ids == [0, 2, *llm.tokenizer.encode("the tin", add_special_tokens=False), 3]
    reply = llm.chat(MESSAGES, GREEDY)
    assert reply == llm.generate(ids, GREEDY)[0]
    assert "".join(chunk.text for chunk in llm.stream_chat(MESSAGES, GREEDY)) == reply.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"implementation": "magic"}, "xla"),
        ({"context": 0}, "from 2 to the model's 163840"),
        ({"context": 1}, "from 2 to the model's 163840"),
        ({"context": 163841}, "from 2 to the model's 163840"),
        ({"batch": 0}, "at least 1"),
        ({"devices": []}, "list of at least one device"),
    ],
)
def test_bad_arguments(llm, arguments, message):
    with pytest.raises(KtxError, match=message):
        LLM(llm.path, **arguments)


def test_a_stop_text_ends_each_prompt_when_it_comes(llm):
    """Nothing is computed past a stop text, in whichever prompt of a batch it comes first."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    prompts = [[5, 6, 7], [9, 8], [30, 31, 32, 33]]
    texts = [reply.text for reply in llm.generate(prompts, params)]
    stop = next(texts[2][i : i + 1] for i in range(len(texts[2])) if texts[2][i] not in texts[0] + texts[1])
    replies = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop=stop))
    assert [reply.finish_reason for reply in replies] == ["length", "length", "stop"]
    assert len(replies[2].token_ids) < 24
