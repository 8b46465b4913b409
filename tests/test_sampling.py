# SPDX-License-Identifier: Apache-2.0
"""Drawing: distributions, truncation, repeatability, and independence of neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx_jax.engine.requests import SamplingParams
from ktx_jax.engine.sampling import Draw, sample
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
