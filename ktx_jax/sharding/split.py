# SPDX-License-Identifier: Apache-2.0
"""Splits a row of things that must stay in order over boxes of unequal size, filling all to a like share."""

from collections.abc import Sequence
from itertools import accumulate

_STEPS = 40  # bisections of the share: finer than a byte


def split_evenly(costs: Sequence[int], capacities: Sequence[int]) -> list[int] | None:
    """How many of `costs`, in order, each box takes so that the fullest is as empty as can be.

    A box may stay empty. None if they do not fit.
    """
    if _fill(costs, capacities, 1.0) is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _fill(costs, capacities, middle) is not None else (middle, high)
    return _fill(costs, capacities, high)


def _fill(costs: Sequence[int], capacities: Sequence[int], share: float) -> list[int] | None:
    """Each box in turn takes what its share holds; None if something is left."""
    counts, at = [], 0
    for capacity in capacities:
        room = capacity * share
        taken = sum(1 for total in accumulate(costs[at:]) if total <= room)
        counts.append(taken)
        at += taken
    return counts if at == len(costs) else None
