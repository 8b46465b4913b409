# SPDX-License-Identifier: Apache-2.0
"""Scores are those of a whole pass over each sequence, whatever they are packed with."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ktx_ffi
import numpy as np
import pytest
from golden_models import BY_NAME, SMALL_LIMITS, golden_llm, golden_path, small_llm

from ktx_jax.engine.branches import Window
from ktx_jax.engine.engine import Engine
from ktx_jax.engine.requests import SamplingParams
from ktx_jax.engine.scheduler import Limits
from ktx_jax.engine.scoring import Score, Scoring
from ktx_jax.engine.stage import Dtypes
from ktx_jax.engine.step import Steps
from ktx_jax.errors import KtxError
from ktx_jax.llm import LLM
from ktx_jax.resources import demo_model

EXACT = 1e-5  # nats, in float32
CONTEXT = SMALL_LIMITS.context


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small_llm()


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    yield
    assert llm._engine._scheduler.pages[0].available == SMALL_LIMITS.pages


def sequences(vocab: int, seed: int = 0) -> list[Window]:
    """Stems of several lengths around the edges of pages and tiles, with short and long continuations of each; some of
    those agree in turn."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, vocab, count, np.int32)

    out = []
    for length in (3, 31, 64, 70, 127):
        stem = draw(length)
        for more in (1, 1, 2, 9, 33):
            out.append(Window(np.concatenate([stem, draw(more)]), length))
        inner = np.concatenate([stem, draw(20)])
        out += [Window(np.concatenate([inner, draw(n)]), int(rng.integers(1, length + 20))) for n in (1, 4, 12)]
    out += [Window(draw(n), 1) for n in (2, 17, 65, CONTEXT + 1)]
    out.append(out[0])
    return [out[i] for i in rng.permutation(len(out))]


def truth(llm: LLM, wanted: list[Window]) -> list[Score]:
    """By a whole pass over each sequence, without a cache; padded to one length, which attention does not see."""
    fn, params = llm.functional()
    fn, out = jax.jit(fn), []
    for one in wanted:
        padded = np.zeros(CONTEXT + 1, np.int32)
        padded[: len(one.tokens)] = one.tokens
        logits = np.asarray(fn(params, padded), np.float64)[one.start - 1 : len(one.tokens) - 1]
        targets = one.tokens[one.start :]
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        out.append(Score(logprobs[np.arange(len(targets)), targets].astype(np.float32), logits.argmax(-1) == targets))
    return out


def assert_close(scores, expected):
    for score, right in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.logprobs, right.logprobs, atol=EXACT, rtol=0)
        np.testing.assert_array_equal(score.greedy, right.greedy)


@pytest.fixture(scope="module")
def wanted(llm) -> list[Window]:
    return sequences(llm.config.vocab_size)


@pytest.fixture(scope="module")
def expected(llm, wanted) -> list[Score]:
    return truth(llm, wanted)


def test_packed_scores_are_those_of_whole_passes(llm, wanted, expected):
    assert_close(llm.score_windows(wanted), expected)


def test_alone_and_in_any_order(llm, wanted, expected):
    order = np.random.default_rng(1).permutation(len(wanted))
    assert_close(llm.score_windows([wanted[i] for i in order]), [expected[i] for i in order])
    for one, right in zip(wanted[::6], expected[::6], strict=True):
        assert_close(llm.score_windows([one]), [right])


def test_nothing_is_compiled_twice(llm, wanted, compilations):
    llm.score_windows(wanted)
    compilations()
    llm.score_windows(wanted[::-1])
    llm.score_windows(sequences(llm.config.vocab_size, seed=0))
    assert compilations() == 0


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pool_of_one_sequence(llm, wanted, expected, shards):
    """Pages for one whole context, so that branches wait for each other; and the packing for several shards."""
    limits = replace(SMALL_LIMITS, batch=1, shards=shards)
    engine = Engine(llm.config, OneByOne(llm, limits), limits, eos_ids=frozenset())
    scores = {}
    engine.score(wanted, scores.__setitem__)
    assert_close([scores[i] for i in range(len(wanted))], expected)
    assert [pool.available for pool in engine._scheduler.pages] == [limits.pages] * shards


class OneByOne(Steps):
    """Steps for several shards, one after the other: each has a cache of its own."""

    depth = 2

    def __init__(self, llm: LLM, limits: Limits):
        one = replace(limits, shards=1)
        self.shards = [
            Steps(llm.config, llm._model, one, dtypes=Dtypes(llm.dtype, llm.dtype)) for _ in range(limits.shards)
        ]

    def sample(self, *inputs, **options):
        return self.shards[0].sample(*inputs, **options)

    def score(self, run, *rest):
        parts = [
            steps.score(*jax.tree.map(lambda a, i=i: a[i : i + 1], (run, *rest))) for i, steps in enumerate(self.shards)
        ]
        return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    def copy_pages(self, *pages):
        for i, steps in enumerate(self.shards):
            steps.copy_pages(*(a[i : i + 1] for a in pages))


def test_more_targets_than_a_step_holds(llm):
    """Every token of the vocabulary after one stem: the last position is computed as often as it takes."""
    stem = np.arange(3, 70, dtype=np.int32)
    vocab = llm.config.vocab_size
    scores = llm.score_windows([Window(np.append(stem, np.int32(token)), len(stem)) for token in range(vocab)])
    logits = llm.logits(stem.tolist())[-1].astype(np.float64)
    logprobs = np.array([score.logprob for score in scores])
    np.testing.assert_allclose(logprobs, logits - np.logaddexp.reduce(logits), atol=EXACT)
    assert [score.is_greedy for score in scores].index(True) == logits.argmax()
    assert sum(score.is_greedy for score in scores) == 1


def test_shared_beginnings_are_computed_once(llm, monkeypatch):
    counted = []
    score = llm._engine.steps.score
    monkeypatch.setattr(
        llm._engine.steps, "score", lambda run, *a: counted.append((run.positions >= 0).sum()) or score(run, *a)
    )
    stem = np.arange(3, 93, dtype=np.int32)
    llm.score_windows([Window(np.concatenate([stem, np.full(5, n, np.int32)]), len(stem)) for n in range(7)])
    assert sum(counted) == len(stem) + 7 * 4


def test_a_break_gives_every_page_back(llm, wanted):
    class Break(Exception):
        pass

    def stop(index, score):
        raise Break

    with pytest.raises(Break):
        llm.score_windows(wanted, stop)


def test_scoring_while_requests_hold_the_pages(llm, wanted, expected):
    """It waits for them, and they go on meanwhile."""
    stream = llm.stream([5] * 100)
    first = next(stream)
    assert_close(llm.score_windows(wanted[:4]), expected[:4])
    assert first.token_ids
    assert [token for chunk in stream for token in chunk.token_ids]


def test_scores_and_requests_that_wait_for_each_other(llm, monkeypatch):
    """Of three pages a reply has come to hold two and a stem the third: the scores begin anew, the reply goes on."""
    rng, limits = np.random.default_rng(7), replace(SMALL_LIMITS, batch=1)
    stem = rng.integers(0, 200, 64, np.int32)
    wanted = [Window(np.concatenate([stem, rng.integers(0, 200, 40, np.int32)]), 64) for _ in range(20)]
    engine = Engine(llm.config, OneByOne(llm, limits), limits, eos_ids=frozenset())
    request = engine.add([5] * 40, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    assert engine.step()
    scores, anew = {}, []
    step, start_over = Scoring.step, Scoring.start_over
    monkeypatch.setattr(Scoring, "step", lambda self: (engine.step(), step(self))[1])  # as another thread would
    monkeypatch.setattr(Scoring, "start_over", lambda self: anew.append(len(scores)) or start_over(self))
    engine.score(wanted, scores.__setitem__)
    assert 0 < anew[0] < len(wanted)
    while engine.step():
        pass
    assert_close([scores[i] for i in range(len(wanted))], truth(llm, wanted))
    assert request.finish_reason == "length"
    assert [pool.available for pool in engine._scheduler.pages] == [limits.pages]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(np.zeros(CONTEXT + 2, np.int32), 1), f"{CONTEXT + 1} tokens"),
        (Window(np.array([0, 256], np.int32), 1), "outside the vocabulary"),
        (Window(np.array([-1, 3], np.int32), 1), "outside the vocabulary"),
    ],
)
def test_a_bad_sequence_is_an_error_before_any_work(llm, wanted, window, message, monkeypatch):
    monkeypatch.setattr(llm._engine.steps, "score", lambda *a: pytest.fail("a step was computed"))
    with pytest.raises(KtxError, match=message):
        llm.score_windows([wanted[0], window])


def test_pairs_of_texts(llm):
    for context, continuation in (("the tin", " on a"), ("the tin ", "on a"), ("", "there")):
        [score] = llm.score([(context, continuation)])
        whole = llm.encode(context + continuation)
        logits = np.float64(llm.logits(whole))
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        count = len(score.logprobs)
        assert llm.tokenizer.decode(whole[-count:]) == f" {continuation.strip()}"[not context :]
        right = [logprobs[i - 1, whole[i]] for i in range(len(whole) - count, len(whole))]
        np.testing.assert_allclose(score.logprobs, right, atol=EXACT)
    assert (
        llm.score([([3, 4], [5, 6])])[0].logprob
        == llm.score_windows([Window(np.arange(3, 7, dtype=np.int32), 2)])[0].logprob
    )
    assert llm.score([([3, 4], [])])[0].logprob == 0
    assert llm.score([]) == []
    with pytest.raises(KtxError, match="context is empty"):
        llm.score([([], [5])])


def test_a_word_that_the_seam_cuts_is_scored():
    """Together the texts are fewer tokens than the context, as many, or more; the last is never nothing."""
    llm = LLM(demo_model(), context=64, batch=1, dtype="float32", implementation="xla")
    for context, continuation in (("The func", "tion"), ("obj", "ect"), ("retur", "n x")):
        head, whole = llm.encode(context), llm.encode(context + continuation)
        start = next(at for at, token in enumerate(whole) if head[at : at + 1] != [token])
        [score] = llm.score([(context, continuation)])
        logits = np.float64(llm.logits(whole))
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        right = [logprobs[i - 1, whole[i]] for i in range(start, len(whole))]
        assert right, context
        np.testing.assert_allclose(score.logprobs, right, atol=EXACT)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda llm: llm.score(("The", " tin")), r"a list of \(context, continuation\); found at 0: 'The'"),
        (lambda llm: llm.score([("a", "b"), ("a", "b", "c")]), "found at 1"),
        (lambda llm: llm.score([("a", None)]), "expected a text .* found NoneType"),
        (lambda llm: llm.score([([3.5], [4])]), "expected a text .* found list"),
        (lambda llm: llm.score([([3], [4]), ([3], [999_999])]), "sequence 1: token id 999999"),
        (lambda llm: llm.perplexity(b"the text of a file " * 30, 16), "found bytes"),
        (lambda llm: llm.generate(b"the text"), "found bytes"),
        (lambda llm: llm.perplexity("", 16), "too few for a window of 16"),
        (lambda llm: llm.perplexity([3] * 900, CONTEXT + 2), f"window of {CONTEXT + 2} .* context of {CONTEXT}"),
        (lambda llm: llm.perplexity([3] * 9, 2), "window should be at least 3 without a stride"),
    ],
)
def test_what_cannot_be_scored_says_so(unchecked, llm, ask, message):
    with pytest.raises(KtxError, match=message):
        ask(llm)


def test_one_text_is_a_list_of_one(llm):
    assert llm.rolling("the tin")[0].logprob == llm.rolling(["the tin"])[0].logprob
    assert len(llm.rolling([5, 6, 7])[0].logprobs) == 3
    assert llm.perplexity([5, 6, 7], 2, 1).tokens == 2


def test_rolling_scores_every_token_once(llm):
    ids = np.random.default_rng(2).integers(3, 200, CONTEXT + 30).tolist()
    short, long, empty = llm.rolling([ids[:20], ids, ""])
    assert [len(score.logprobs) for score in (short, long, empty)] == [20, CONTEXT + 30, 0]
    assert empty.logprob == 0
    bos = llm.tokenizer.bos_id
    [head] = llm.score([([bos], ids[:CONTEXT])])
    [tail] = llm.score([(ids[29:CONTEXT], ids[CONTEXT:])])
    np.testing.assert_allclose(long.logprobs, np.concatenate([head.logprobs, tail.logprobs]), atol=EXACT)
    np.testing.assert_allclose(short.logprobs, long.logprobs[:20], atol=EXACT)


def test_perplexity_of_halves_and_of_sliding_windows(llm):
    ids = [llm.tokenizer.bos_id, *np.random.default_rng(3).integers(3, 200, 99).tolist()]
    halves = llm.perplexity(ids, 32)
    starts = range(0, 96, 32)
    by_hand = llm.score([([ids[0], *ids[s + 1 : s + 17]], ids[s + 17 : s + 32]) for s in starts])
    nats = -np.concatenate([score.logprobs for score in by_hand])
    assert halves.tokens == 3 * 15
    assert halves.nats == pytest.approx(nats.mean(), abs=EXACT)
    assert halves.value == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    assert halves.nats_error == pytest.approx(nats.std(ddof=1) / np.sqrt(45), rel=1e-4)
    sliding = llm.perplexity(ids, 32, 8)
    parts = [(ids[:1], ids[1:32])] + [(ids[e - 32 : e - 8], ids[e - 8 : e]) for e in range(40, 97, 8)]
    parts.append((ids[72:96], ids[96:]))
    nats = -np.concatenate([score.logprobs for score in llm.score(parts)])
    assert sliding.tokens == 99 == len(nats)
    assert sliding.nats == pytest.approx(nats.mean(), abs=EXACT)
    for window, stride, message in (
        (101, None, "100 tokens"),
        (32, 33, "stride"),
        (1, None, "window should"),
        (32, 0, "stride"),
    ):
        with pytest.raises(KtxError, match=message):
            llm.perplexity(ids, window, stride)


def test_bfloat16_does_not_depend_on_the_batch():
    llm = golden_llm("grouped", "bfloat16")
    wanted = [one for one in sequences(llm.config.vocab_size, seed=4) if len(one.tokens) < 140][:20]
    together = llm.score_windows(wanted)
    for one, score in zip(wanted, together, strict=True):
        [alone] = llm.score_windows([one])
        assert abs(alone.logprobs - score.logprobs).max() < 1e-3


@pytest.mark.skipif(not ktx_ffi.available(), reason=f"no CPU kernels: {ktx_ffi.why_unavailable()}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bit_for_bit_on_the_cpu_kernels(dtype):
    variant = BY_NAME["grouped"]
    wanted = sequences(variant.vocab, seed=5)
    results = []
    for batch, order in ((1, 1), (8, -1)):
        llm = LLM(golden_path(variant), implementation="ffi", context=CONTEXT, batch=batch, dtype=dtype)
        results.append(llm.score_windows(wanted[::order])[::order])
    results.append([llm.score_windows([one])[0] for one in wanted])
    for other in results[1:]:
        for score, same in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(score.logprobs, same.logprobs)
            np.testing.assert_array_equal(score.greedy, same.greedy)
