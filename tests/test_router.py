# SPDX-License-Identifier: Apache-2.0
"""The router against the routing rule written out for one token at a time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import golden_config

from ktx_jax.model.modules import Router


def route(scores: np.ndarray, groups: int, groups_used: int, used: int) -> list[int]:
    """Experts of one token, likeliest first: of the groups whose best expert is best, the best experts."""
    size = len(scores) // groups
    best = sorted(range(groups), key=lambda g: -scores[g * size : (g + 1) * size].max())[:groups_used]
    allowed = [expert for expert in range(len(scores)) if expert // size in best]
    return sorted(allowed, key=lambda expert: -scores[expert])[:used]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("experts", "groups", "groups_used", "used"), [(160, 8, 3, 6), (64, 1, 1, 6), (12, 4, 1, 3), (12, 3, 3, 5)]
)
def test_router(experts, groups, groups_used, used, norm):
    config = dataclasses.replace(
        golden_config("split"), n_routed_experts=experts, n_group=groups, topk_group=groups_used,
        num_experts_per_tok=used, norm_topk_prob=norm, routed_scaling_factor=16.0, hidden_size=32,
    )  # fmt: skip
    router = Router(config, nnx.Rngs(0))
    weight, x = (np.asarray(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate([(experts, 32), (40, 32)]))
    router.weight.set_value(jnp.asarray(weight))
    live = np.arange(40) % 5 > 0
    ids, weights = jax.jit(router.route)(jnp.asarray(x), jnp.asarray(live))
    logits = np.float64(x) @ np.float64(weight).T
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    chosen = np.array([route(row, groups, groups_used, used) for row in scores])
    np.testing.assert_array_equal(ids, np.where(live[:, None], chosen, -1))
    expected = np.take_along_axis(scores, chosen, axis=1)
    if norm:
        expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, 16.0 * expected, rtol=1e-4)


def test_bfloat16_activations_are_routed_in_float32():
    router = Router(golden_config("split"), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 32)).astype(jnp.bfloat16)
    run = partial(jax.jit(router.route), live=jnp.ones(4, bool))
    _, weights = run(x)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, run(x.astype(jnp.float32))[1])
