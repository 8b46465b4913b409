# SPDX-License-Identifier: Apache-2.0
"""Drawing: distributions, truncation, repeatability, and independence of neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.edits import make_edits
from ktx_jax.engine.requests import Request, SamplingParams
from ktx_jax.engine.sampling import Draw, Edits, _edit, sample, sample_apart
from ktx_jax.engine.scheduler import Share, Work
from ktx_jax.errors import KtxError


def draw(rows, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position=None):
    seeds = np.broadcast_to(np.asarray(seed, np.uint32), (rows,))
    return Draw(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        min_p=jnp.full(rows, min_p, jnp.float32),
        seed=jnp.asarray(np.stack([np.zeros_like(seeds), seeds], axis=1)),
        position=jnp.asarray(np.arange(rows) if position is None else position, jnp.int32),
    )


sample_jit = jax.jit(sample, static_argnames="top")


def test_temperature_zero_is_the_maximum():
    logits = jax.random.normal(jax.random.key(0), (5, 64))
    drawn = sample_jit(logits, draw(5, temperature=0.0), top=3)
    np.testing.assert_array_equal(drawn.token, logits.argmax(-1))
    np.testing.assert_array_equal(drawn.top_ids[:, 0], logits.argmax(-1))
    np.testing.assert_allclose(drawn.logprob, jax.nn.log_softmax(logits).max(-1), rtol=1e-6)
    np.testing.assert_array_equal(drawn.top_logprobs[:, 0], drawn.logprob)


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    drawn = sample_jit(jnp.tile(logits, (20_000, 1)), draw(20_000), top=0)
    share = np.bincount(np.asarray(drawn.token), minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.012)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_p": 0.6, "top_k": 2}, {0}),  # after top_k the first holds 0.625
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.29}, {0, 1, 2}),
        ({"min_p": 0.31}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.31, "top_p": 0.5}, {0}),
        ({"temperature": 0.01}, {0}),
    ],
)
def test_truncation_keeps_just_the_nucleus(options, kept):
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    drawn = sample_jit(jnp.tile(logits, (4000, 1)), draw(4000, **options), top=0)
    assert set(np.asarray(drawn.token).tolist()) == kept


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.data())
@settings(max_examples=30, deadline=None)
def test_a_draw_does_not_depend_on_its_neighbours(seed, rows, data):
    logits = jax.random.normal(jax.random.key(seed % 1000), (rows, 50)) * 3
    row = data.draw(st.integers(0, rows - 1))
    options = draw(rows, temperature=1.3, top_p=0.9, top_k=20, seed=(np.arange(rows, dtype=np.uint64) + seed) % 2**32)
    together = sample_jit(logits, options, top=0).token[row]
    alone = sample_jit(logits[row : row + 1], jax.tree.map(lambda a: a[row : row + 1], options), top=0).token[0]
    assert together == alone


def test_nucleus_equals_the_sorted_definition():
    logits = np.asarray(jax.random.normal(jax.random.key(3), (1, 1000)) * 2)
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    nucleus = order[: np.searchsorted(np.cumsum(probabilities[order]), 0.7) + 1]
    tokens = sample_jit(jnp.tile(logits, (5000, 1)), draw(5000, top_p=0.7), top=0).token
    assert set(np.asarray(tokens).tolist()) <= set(nucleus.tolist())


def edits(rows, size, **changes):
    none = {
        "tokens": np.full((rows, 4), size, np.int32),
        "factor": np.ones((rows, 4), np.float32),
        "add": np.zeros((rows, 4), np.float32),
        "allowed": np.full((rows, -(-size // 32)), 0xFFFFFFFF, np.uint32),
    }
    return Edits(**{name: jnp.asarray(value) for name, value in (none | changes).items()})


def test_edits_are_made_where_they_are_asked_for():
    logits = np.asarray(jax.random.normal(jax.random.key(1), (3, 50)))
    tokens = np.asarray([[3, 40, 7, 50], [50] * 4, [0, 49, 50, 50]], np.int32)
    factor = np.asarray([[2, 0.5, 1, 9], [9] * 4, [1, 3, 1, 1]], np.float32)
    add = np.asarray([[0, 1, -5, 9], [9] * 4, [4, 0, 0, 0]], np.float32)
    allowed = np.asarray([[0xFFFFFFFF] * 2, [0xFFFFFFFF] * 2, [1 << 31 | 1, 1 << 17]], np.uint32)  # 31, 0, 49
    truth = logits.copy()
    for row in range(3):
        for token, f, a in zip(tokens[row], factor[row], add[row], strict=True):
            if token < 50:
                x = logits[row, token]
                truth[row, token] = (x / f if x > 0 else x * f) + a
    truth[2, [i for i in range(50) if i not in (0, 31, 49)]] = -np.inf
    edited = _edit(jnp.asarray(logits), edits(3, 50, tokens=tokens, factor=factor, add=add, allowed=allowed))
    np.testing.assert_array_equal(edited, truth)


def test_edited_rows_in_a_program_of_their_own():
    """The same draws as within the step; log-probabilities stay those of the logits as they were."""
    logits = jax.random.normal(jax.random.key(2), (2, 3, 50)) * 3
    options = draw(6, temperature=0.8, top_p=0.9, seed=np.arange(6))
    options = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), options)
    none = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), edits(6, 50))
    drawn = sample_apart(logits, options, none, top=2)
    for shard in range(2):
        plain = sample_jit(logits[shard], jax.tree.map(lambda a, s=shard: a[s], options), top=2)
        np.testing.assert_array_equal(drawn.token[shard], plain.token)
        np.testing.assert_array_equal(drawn.top_ids[shard], plain.top_ids)
        np.testing.assert_allclose(drawn.logprob[shard], plain.logprob, rtol=1e-6)


def test_penalties_count_the_reply_and_repetition_the_prompt_too():
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, logit_bias={4: 2.0, 9: -1.0}
    )
    request = Request([1, 2, 2], params, 10, output=[4, 5, 5], pages=[0])
    request.counts.update(request.output)
    work = Work((Share(request, 5, 6), Share(Request([1], SamplingParams(), 10), 0, 1)), decode=True)
    made = make_edits(work, 1, 2, 64)
    row = {t: (f, a) for t, f, a in zip(made.tokens[0, 0], made.factor[0, 0], made.add[0, 0], strict=True) if t < 64}
    assert row == {1: (1.5, 0), 2: (1.5, 0), 4: (1.5, 1.25), 5: (1.5, -1.0), 9: (1.0, -1.0)}
    assert (made.tokens[0, 1] == 64).all()
    assert (made.allowed == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1},
        {"seed": -1}, {"stop": [""]}, {"logprobs": 21}, {"max_tokens": 0}, {"min_p": 1.5}, {"presence_penalty": 3},
        {"frequency_penalty": float("nan")}, {"repetition_penalty": 0}, {"logit_bias": {3: 101}},
        {"logit_bias": {-1: 1}}, {"logit_bias": dict.fromkeys(range(1025), 1)}, {"stop_token_ids": [-2]},
    ],
)  # fmt: skip
def test_bad_parameters_are_named(bad):
    with pytest.raises(KtxError, match=next(iter(bad))):
        SamplingParams(**bad)
