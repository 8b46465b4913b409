# SPDX-License-Identifier: Apache-2.0
"""The GPU attention kernel in Mosaic's CPU interpreter, against the gathered reference in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
from pallas_cases import attention_case, interpreter, relative_error

from pallas_kernels import mla_attention as family
from pallas_kernels.mla_attention import mla_attention, mla_attention_reference


@pytest.mark.parametrize(
    ("heads", "page", "blocks", "tile", "positions"),
    [
        pytest.param(16, 64, 2, 1, [63, 64, -1], id="decode at the edges of a page, and padding"),
        pytest.param(16, 16, 5, 4, [61, 62, 63, 64], id="a chunk of four tokens over small pages"),
        pytest.param(128, 64, 1, 1, [17], id="two blocks of heads"),
    ],
)
def test_it_meets_the_reference(heads, page, blocks, tile, positions):
    case = attention_case(heads, page, blocks, tile, positions, seed=1, bits=tile == 1)
    with interpreter():
        out = mla_attention(*case, scale=0.1, tile=tile, interpret=True)
    live = np.array(positions) >= 0
    assert np.isfinite(out).all()
    assert relative_error(out[live], mla_attention_reference(*case, 0.1)[live]) < 4e-3


def test_ranges_of_the_cache_are_merged(monkeypatch):
    case = attention_case(16, 64, 5, 1, [300, 70], seed=2)
    monkeypatch.setattr(family, "attention_splits", lambda blocks, positions: 3)
    with interpreter():
        parts = mla_attention(*case, scale=0.1, interpret=True)
    assert relative_error(parts, mla_attention_reference(*case, 0.1)) < 4e-3


def test_what_the_kernel_cannot_take_is_named():
    q, rope, pages, table, sequence, positions = attention_case(16, 64, 1, 1, [3], seed=3)
    with pytest.raises(NotImplementedError, match="not 256 \\+ 64"):
        mla_attention(q[..., :256], rope, pages, table, sequence, positions, scale=0.1)
    with pytest.raises(NotImplementedError, match="not 48"):
        mla_attention(q, rope, pages[:, :48], table, sequence, positions, scale=0.1)
    with pytest.raises(NotImplementedError, match="queries float32"):
        mla_attention(q.astype(jnp.float32), rope, pages, table, sequence, positions, scale=0.1)
    with pytest.raises(ValueError, match="runs of 2"):
        mla_attention(q, rope, pages, table, sequence, positions, scale=0.1, tile=2)
