# SPDX-License-Identifier: Apache-2.0
"""Scales of a quantization group by least squares: the search shared by every quantizer.

A group is the last axis. For each candidate step size the values are rounded to levels, and the scale (and offset)
that then minimizes the squared error has a closed form; the candidate with the least error wins. The rounding that
is stored is done again by the caller, from the scale as the format can represent it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

F32 = np.float32


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    zero = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape), F32)
    return np.divide(numerator, denominator, out=zero, where=denominator != 0)


def levels(x: Float[np.ndarray, "*lead n"], scale: Float[np.ndarray, "*lead"]) -> Float[np.ndarray, "*lead n"]:
    """Values in units of their group's scale, 0 where the scale is 0."""
    return _divide(x, np.broadcast_to(scale[..., None], x.shape))


def fit_scale(
    x: Float[np.ndarray, "*lead n"],
    assign: Callable[[np.ndarray], np.ndarray],
    extremes: Sequence[float],
) -> Float[np.ndarray, "*lead"]:
    """The scale d of `x ~ d * level` for each group, of least squared error among the candidates.

    `assign` rounds values in units of d to levels of the format. A candidate maps the group's largest magnitude, sign
    included, to one of `extremes` (levels, perhaps fractional or beyond the format's range, where `assign` clips).
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[..., 0]
    best = np.zeros(peak.shape, F32)
    best_gain = np.zeros(peak.shape, F32)
    for extreme in extremes:
        q = assign(levels(x, peak / F32(extreme)))
        xq, qq = np.sum(x * q, -1), np.sum(q * q, -1)
        d = _divide(xq, qq)
        # The squared error is |x|^2 - gain.
        gain = d * xq
        better = gain > best_gain
        best = np.where(better, d, best)
        best_gain = np.where(better, gain, best_gain)
    return best


def fit_affine(
    x: Float[np.ndarray, "*lead n"],
    top: int,
    stretches: Sequence[float],
    offset_at_most_zero: bool,
) -> tuple[Float[np.ndarray, "*lead"], Float[np.ndarray, "*lead"]]:
    """Scale and offset (d, m) of `x ~ d * q + m`, q in 0..top, of least squared error among the candidates.

    A candidate spreads the group's range over `top + stretch` levels. The K-quants subtract an unsigned minimum: for
    them the offset is kept at or below zero.
    """
    low, high = x.min(-1), x.max(-1)
    if offset_at_most_zero:
        low = np.minimum(low, 0)
    n = F32(x.shape[-1])
    sx = x.sum(-1)
    best_d, best_m = _divide(high - low, np.full_like(low, top)), low
    best_error = np.full(low.shape, np.inf, F32)
    for stretch in stretches:
        q = np.clip(np.rint(levels(x - low[..., None], (high - low) / F32(top + stretch))), 0, top)
        sq, sqq, sxq = q.sum(-1), np.sum(q * q, -1), np.sum(x * q, -1)
        d = _divide(n * sxq - sx * sq, n * sqq - sq * sq)
        m = (sx - d * sq) / n
        if offset_at_most_zero:
            d = np.where(m > 0, _divide(sxq, sqq), d)
            m = np.minimum(m, 0)
        error = np.sum(np.square(x - d[..., None] * q - m[..., None]), -1)
        better = (error < best_error) & (d > 0)
        best_d, best_m = np.where(better, d, best_d), np.where(better, m, best_m)
        best_error = np.where(better, error, best_error)
    return best_d, best_m
