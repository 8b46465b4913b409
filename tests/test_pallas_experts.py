# SPDX-License-Identifier: Apache-2.0
"""The GPU experts in Mosaic's CPU interpreter, against every expert in float32; and how pairs are grouped."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pallas_cases import experts_case, interpreter, relative_error

from pallas_kernels import groups
from pallas_kernels.grouped_matmul import grouped_mlp, grouped_mlp_reference
from pallas_kernels.groups import group_pairs, tile_count

# Few lengths: each is compiled.
_IDS = st.sampled_from([1, 11, 60]).flatmap(lambda n: st.lists(st.integers(-1, 6), min_size=n, max_size=n))


@given(_IDS, st.sampled_from([8, 16]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_pair_has_a_row_in_a_tile_of_its_expert(ids, rows, compared):
    ids, experts = np.array(ids, np.int32), 5
    limit = groups._COMPARED_PAIRS
    groups._COMPARED_PAIRS = 1024 if compared else 0
    try:
        got = group_pairs(jnp.asarray(ids), experts, rows)
    finally:
        groups._COMPARED_PAIRS = limit
    expert, pair, place = (np.asarray(a) for a in got)
    assert expert.shape == (tile_count(len(ids), experts, rows),)
    known = (ids >= 0) & (ids < experts)
    assert (place[~known] == expert.size * rows).all()
    assert len(set(place[known])) == known.sum()
    assert (expert[place[known] // rows] == ids[known]).all()
    assert (pair[place[known]] == np.flatnonzero(known)).all()
    assert (pair != len(ids)).sum() == known.sum()
    used = np.unique(place[known] // rows)
    assert (expert[np.setdiff1d(np.arange(expert.size), used)] == experts).all()
    assert len(used) == sum(-(-(ids[known] == e).sum() // rows) for e in range(experts))


@pytest.mark.slow  # of these the model's operation has a small one, in test_pallas_ops.py
@pytest.mark.parametrize(("tokens", "names"), [(1, ("Q4_K", "Q6_K")), (5, ("Q4_K", "Q5_0")), (9, ("IQ4_XS", "Q8_0"))])
def test_few_tokens(tokens, names):
    case = experts_case(tokens, 5, 2, 256, 256, names, tokens)
    with interpreter():
        out = grouped_mlp(*case, interpret=True)
    # Only the hidden values are rounded.
    assert relative_error(out, grouped_mlp_reference(*case)) < 8e-3


@pytest.mark.parametrize(
    ("names", "d", "width"),
    [
        (("Q8_0", "Q5_0"), 128, 128),
        pytest.param(("Q4_K", "Q6_K"), 256, 256, marks=pytest.mark.slow),
        pytest.param(("Q5_K", "Q8_0"), 256, 128, marks=pytest.mark.slow),
    ],
)
def test_many_tokens(names, d, width):
    case = experts_case(21, 2, 2, d, width, names, 7)
    with interpreter():
        out = grouped_mlp(*case, interpret=True)
    assert relative_error(out, grouped_mlp_reference(*case)) < 2e-2


def test_shapes_that_do_not_fit_are_named():
    x, ids, weights, gate, up, down, names = experts_case(1, 2, 1, 256, 256, ("Q4_K", "Q8_0"), 8)
    with pytest.raises(ValueError, match="down has shape"):
        grouped_mlp(x, ids, weights, gate, up, down[:, :2], names)
    with pytest.raises(NotImplementedError, match="float32"):
        grouped_mlp(x.astype(jnp.float32), ids, weights, gate, up, down, names)
