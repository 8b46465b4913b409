# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel of the router's choice in Mosaic's CPU interpreter, against `jax.lax.top_k`."""

import jax.numpy as jnp
import numpy as np
import pytest
from pallas_cases import interpreter

from pallas_kernels.router import choose_experts, choose_experts_reference

_V25 = {"experts": 6, "groups": 8, "kept_groups": 3, "scale": 16.0}
_LITE = {"experts": 6, "groups": 1, "kept_groups": 1, "scale": 1.0}
_SHAPES = [
    pytest.param(160, _V25, id="V2.5"),
    pytest.param(64, _LITE, id="V2-Lite"),
    pytest.param(10, _LITE | {"groups": 5, "kept_groups": 3}, id="a few"),
]


def _both(logits, live, choice):
    with interpreter():
        got = choose_experts(logits, live, **choice, interpret=True)
    return got, choose_experts_reference(logits, live, **choice)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("count", "choice"), _SHAPES)
def test_it_chooses_as_top_k_does(count, choice, normalized):
    """Logits in few steps, so that experts and groups tie; rows without a token; one expert far above the others."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((7, count)) * 2).astype(np.float32)
    logits[5] = 0.0
    logits[6, 3] = 200.0  # all others' scores are zero, as are those of groups that are left out
    live = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
    (ids, weights), (want_ids, want_weights) = _both(jnp.asarray(logits), live, choice | {"normalized": normalized})
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-6)
    assert (np.asarray(ids)[[2, 4]] == -1).all()
    assert (np.asarray(ids)[5] == range(6)).all()


@pytest.mark.parametrize(("count", "choice"), _SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(count, choice):
    logits = np.random.default_rng(1).standard_normal((3, count)).astype(np.float32)
    among = np.full((5, count), np.nan, np.float32)
    among[1:4] = logits
    choice = choice | {"normalized": True}
    alone, _ = _both(jnp.asarray(logits), jnp.ones(3, bool), choice)
    poisoned, _ = _both(jnp.asarray(among), jnp.ones(5, bool), choice)
    for a, b in zip(alone, poisoned, strict=True):
        np.testing.assert_array_equal(a, b[1:4])


def test_what_the_kernel_cannot_take_is_named():
    live, choice = jnp.ones(1, bool), _V25 | {"normalized": False}
    with pytest.raises(NotImplementedError, match="up to 256 experts, not among 512"):
        choose_experts(jnp.zeros((1, 512)), live, **choice)
    with pytest.raises(ValueError, match="32 experts in 8 groups do not give 13 of 3 groups"):
        choose_experts(jnp.zeros((1, 32)), live, **choice | {"experts": 13})
