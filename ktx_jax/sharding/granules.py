# SPDX-License-Identifier: Apache-2.0
"""Where a quantized row may be cut, and how many bytes the pieces take.

K-quants share a super-block's scales among 256 values, and have scales of their own for every 32 or 16 of them. A row
may be cut between those: a piece then holds every super-block that it touches, scales repeated and the rest zero, and
all pieces have the size of the largest.
"""

import math

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_T = GGMLQuantizationType

GRANULES: dict[GGMLQuantizationType, int] = {
    _T.F32: 1, _T.F16: 1, _T.BF16: 1,
    _T.Q4_0: 32, _T.Q4_1: 32, _T.Q5_0: 32, _T.Q5_1: 32, _T.Q8_0: 32, _T.IQ4_NL: 32,
    _T.Q2_K: 16, _T.Q3_K: 16, _T.Q4_K: 32, _T.Q5_K: 32, _T.Q6_K: 16, _T.IQ4_XS: 32,
}  # fmt: skip
"""The values along K that must stay together, for each type that stays as it is in the file."""


def stored_type(ggml_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type in memory: rare types become Q8_0 while loading."""
    return ggml_type if ggml_type in GRANULES else _T.Q8_0


def stored_bytes(shape: tuple[int, ...], ggml_type: GGMLQuantizationType, cuts: tuple[int, ...] = ()) -> int:
    """Bytes of one piece of an array of logical `shape` and stored type, cut into `cuts[i]` equal parts along axis i.

    The parts must divide their axes, the last one's at the type's granule.
    """
    cuts = cuts + (1,) * (len(shape) - len(cuts))
    *rows, k = (size // parts for size, parts in zip(shape, cuts, strict=True))
    block, size = GGML_QUANT_SIZES[ggml_type]
    if k % block == 0:
        return math.prod(rows) * (k // block) * size
    touched = max(-(-(i + 1) * k // block) - i * k // block for i in range(cuts[-1]))
    return math.prod(rows) * touched * size
