# SPDX-License-Identifier: Apache-2.0
"""Quantized weights in host memory."""

import math
import weakref

import numpy as np
from jaxtyping import Array, Integer, UInt8

from ktx_ffi._library import library

# ggml type -> (block size, bytes of a block)
_BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    20: (32, 18),  # IQ4_NL
    23: (256, 136),  # IQ4_XS
    30: (1, 2),  # BF16
}

SUPPORTED_TYPES: frozenset[int] = frozenset(_BLOCKS)


class Weights:
    """Weights of logical shape `[*lead, N, K]` behind an integer handle.

    `blocks`: raw ggml blocks `[*lead, N, K / block_size, type_size]`, contiguous in the last two axes.
    `repack=True` copies them, in parallel, into the layout the kernels read; `repack=False` keeps the array itself.
    Raises ValueError for a type the kernels do not read or blocks of another shape, RuntimeError without the library.
    """

    def __init__(self, blocks: UInt8[np.ndarray, "*lead N nb ts"], ggml_type: int, *, repack: bool = True):
        number = int(ggml_type)
        self._handle = library().create_weights(blocks, number, repack)
        self._release = weakref.finalize(self, library().release_weights, self._handle)
        self._release.atexit = False
        self.ggml_type = number
        self.repacked = repack
        self.shape: tuple[int, ...] = (*blocks.shape[:-2], blocks.shape[-2] * _BLOCKS[number][0])
        self.nbytes: int = library().weight_bytes(self._handle) if repack else math.prod(blocks.shape)

    @property
    def handle(self) -> int:
        """The number the kernels know the weights by; raises ValueError after `close`."""
        if not self._release.alive:
            raise ValueError("these weights are closed")
        return self._handle

    @property
    def operand(self) -> np.ndarray:
        """The handle as a uint32 scalar, to pass to a jitted function."""
        return np.asarray(self.handle, np.uint32)

    def close(self) -> None:
        """Frees the weights once the calls under way are done."""
        self._release()

    def __repr__(self) -> str:
        return f"Weights(shape={self.shape}, ggml_type={self.ggml_type}, repacked={self.repacked})"


Handle = Weights | Integer[Array, "..."] | Integer[np.ndarray, "..."]


def operand(w: Handle) -> Array | np.ndarray:
    """The handle of `w` as the uint32 operand of a call."""
    if isinstance(w, Weights):
        return w.operand
    if w.size != 1:
        raise ValueError(f"a weight handle must be one integer, not an array of shape {w.shape}")
    return w.astype(np.uint32)
