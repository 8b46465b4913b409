# SPDX-License-Identifier: Apache-2.0
"""How many experts a step touches on each device, if the router has no favourites."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ktx_jax.model.config import Config

_DRAWS = 200
_MOST_SCORES = 1 << 20  # in one draw of many tokens: fewer draws are enough then


@dataclass(frozen=True)
class ExpertsUsed:
    """Expected numbers in one layer.

    Attributes:
      distinct: different experts that are chosen, over all devices.
      busiest: different experts on the device that has most of them: all others wait for it.
      pairs: tokens times experts on the device that has most of those.
    """

    distinct: float
    busiest: float
    pairs: float


@lru_cache
def experts_used(config: Config, tokens: int, parts: int) -> ExpertsUsed:
    """Of `tokens` tokens whose experts' scores are alike, with experts cut into `parts` consecutive parts.

    Averages over draws from a fixed seed. Groups limit a token to few parts (DeepSeek-V2, arXiv:2405.04434, section
    2.2.2), and so load one of them more than free choice would.
    """
    c, rng = config, np.random.default_rng(0)
    draws = max(4, min(_DRAWS, _MOST_SCORES // (tokens * c.n_routed_experts)))
    found = np.zeros(3)
    for _ in range(draws):
        scores = rng.random((tokens, c.n_group, c.n_routed_experts // c.n_group))
        kept = np.argsort(-scores.max(-1), axis=-1)[:, : c.topk_group]
        allowed = np.zeros((tokens, c.n_group, 1))
        np.put_along_axis(allowed, kept[..., None], 1, axis=1)
        ids = np.argsort(-(scores * allowed).reshape(tokens, -1), axis=-1)[:, : c.num_experts_per_tok]
        pairs = np.bincount(ids.ravel(), minlength=c.n_routed_experts).reshape(parts, -1)
        found += ((pairs > 0).sum(), (pairs > 0).sum(-1).max(), pairs.sum(-1).max())
    return ExpertsUsed(*(found / draws).tolist())
