# SPDX-License-Identifier: Apache-2.0
"""However a sequence is cut into steps, and whatever shares them, its logits are those of one whole pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import LOGITS, SMALL_LIMITS, golden_llm, relative_error, small_llm

from ktx_jax.engine.engine import Engine
from ktx_jax.engine.requests import Request, SamplingParams
from ktx_jax.engine.scheduler import Share, Work
from ktx_jax.engine.stage import by_rows
from ktx_jax.engine.step import make_run
from ktx_jax.llm import LLM

LENGTH = 150
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Sequences:
    """Several sequences driven through the compiled steps by hand, on shuffled pages."""

    def __init__(self, llm: LLM, tokens: np.ndarray):
        self.llm, self.limits = llm, llm._engine.limits
        limits = self.limits
        pages = np.random.default_rng(1).permutation(limits.pages).tolist()
        self.requests = [Request(row.tolist(), SamplingParams(), 0) for row in tokens]
        for request in self.requests:
            request.pages = [pages.pop() for _ in range(limits.pages_per_sequence)]
        self.logits = np.full((*tokens.shape, llm.config.vocab_size), np.nan, np.float32)

    def run(self, stops: dict[int, int], *, decode: bool) -> None:
        """One step that takes each row in `stops` up to that position."""
        shares = tuple(Share(self.requests[row], self.requests[row].computed, stop) for row, stop in stops.items())
        run, last = make_run(Work(shares, decode), self.limits)
        out = self.llm._engine.steps.logits(run, np.arange(run.tokens.shape[1], dtype=np.int32)[None])[0]
        for row, share, end in zip(stops, shares, last[0] + 1, strict=False):
            self.logits[row, share.start : share.stop] = out[end - (share.stop - share.start) : end]
            share.request.computed = share.stop


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small_llm()


@pytest.fixture(scope="module")
def tokens(llm) -> np.ndarray:
    return np.random.default_rng(5).integers(0, llm.config.vocab_size, (2, LENGTH))


@pytest.fixture(scope="module")
def whole(llm, tokens) -> np.ndarray:
    """Logits of each sequence in one pass without a cache."""
    fn, params = llm.functional()
    return np.asarray(jax.jit(jax.vmap(fn, (None, 0)))(params, jnp.asarray(tokens, jnp.int32)))


@pytest.fixture(scope="module")
def engine(llm) -> Engine:
    return llm._engine


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, LENGTH])
def test_chunks_of_a_prompt(engine, tokens, whole, length):
    logits = engine.logits(tokens[0, :length].tolist())
    np.testing.assert_allclose(logits, whole[0, :length], **CLOSE)


def test_token_by_token(llm, tokens, whole):
    sequences = Sequences(llm, tokens[:1])
    for stop in range(1, LENGTH + 1):
        sequences.run({0: stop}, decode=True)
    np.testing.assert_allclose(sequences.logits[0], whole[0], **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_steps(llm, tokens, whole, seed):
    """Ragged chunks and decode steps, of one sequence or both, in any order."""
    rng, sequences = np.random.default_rng(seed), Sequences(llm, tokens)
    while left := [row for row, request in enumerate(sequences.requests) if request.computed < LENGTH]:
        rows = rng.permutation(left)[: rng.integers(1, 3)].tolist()
        decode = bool(rng.integers(2))
        most = 1 if decode else SMALL_LIMITS.chunk // len(rows)
        stops = {row: sequences.requests[row].computed + int(rng.integers(1, most + 1)) for row in rows}
        sequences.run({row: min(stop, LENGTH) for row, stop in stops.items()}, decode=decode)
    np.testing.assert_allclose(sequences.logits, whole, **CLOSE)


def test_past_the_original_context():
    """Where an error in YaRN's frequencies has had thousands of positions to grow: prefill in chunks to 4608, decode
    from there, one whole pass, and transformers."""
    llm, tokens = golden_llm("grouped", context=4672, batch=1), LOGITS["long.tokens"].astype(np.int32)
    sequences = Sequences(llm, tokens[None])
    for stop in range(512, 4609, 512):
        sequences.run({0: stop}, decode=False)
    for stop in range(4609, len(tokens) + 1):
        sequences.run({0: stop}, decode=True)
    fn, params = llm.functional()
    whole = np.asarray(jax.jit(fn)(params, jnp.asarray(tokens)))
    np.testing.assert_allclose(sequences.logits[0], whole, **CLOSE)
    truth, at = LOGITS["long.logits"], LOGITS["long.at"]
    assert relative_error(truth, sequences.logits[0, at]) < 1e-4
    assert relative_error(truth, whole[at]) < 1e-4


def test_drawn_tokens_are_the_most_likely_of_the_logits(engine, llm):
    """What the engine's own steps draw, over page and chunk edges, is what a whole pass makes most likely."""
    prompt = list(range(3, 61))
    requests = [engine.add(p, SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)) for p in (prompt, [9])]
    while engine.step():
        pass
    for request in requests:
        assert request.finish_reason == "length"
        logits = engine.logits(request.prompt + request.output)
        assert logits[len(request.prompt) - 1 : -1].argmax(-1).tolist() == request.output
    assert engine.stats().pages_free == SMALL_LIMITS.pages


@pytest.mark.parametrize(("count", "most"), [(1, 1), (128, 128), (130, 65), (256, 128), (384, 128), (500, 125)])
def test_logits_are_there_for_some_rows_at_a_time(count, most):
    seen = []

    def f(rows):
        x, extra = rows
        seen.append(x.shape[0])
        return x.sum(axis=-1) > extra, {"each": x * 2, "none": None}

    x, extra = np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32), np.zeros(count, np.float32)
    large, rest = jax.jit(lambda *rows: by_rows(f, rows))(x, extra)
    np.testing.assert_array_equal(large, x.sum(-1) > 0)
    np.testing.assert_array_equal(rest["each"], 2 * x)
    assert set(seen) == {most}
