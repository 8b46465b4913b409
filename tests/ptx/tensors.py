# SPDX-License-Identifier: Apache-2.0
"""Global memory, and tensors in it that are copied box by box ("Tensors", "cp.async.bulk.tensor")."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .shared import swizzled
from .text import Fault

_ROOM = 1024
"""Between buffers, and what their addresses are multiples of."""


class Global:
    """Buffers in global memory, from copies of arrays; an access outside of all of them is a `Fault`."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.sizes = np.array([a.nbytes for a in arrays])
        rooms = -(-self.sizes // _ROOM) * _ROOM + _ROOM
        self.bases = (1 << 16) + np.cumsum(rooms) - rooms
        self.bytes = np.full(int(self.bases[-1] + rooms[-1]), 0xFF, np.uint8)
        for array, base in zip(arrays, self.bases, strict=True):
            self.bytes[base : base + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def array(self, index: int, like: np.ndarray) -> np.ndarray:
        """A buffer's contents."""
        raw = self.bytes[self.bases[index] : self.bases[index] + self.sizes[index]]
        return np.frombuffer(raw.tobytes(), like.dtype).reshape(like.shape)

    def check(self, places: np.ndarray, what: str) -> None:
        owner = np.searchsorted(self.bases, places, side="right") - 1
        stray = (owner < 0) | (places >= self.bases[owner] + self.sizes[owner])
        if stray.any():
            raise Fault(f"{what} of global memory that is nobody's, at {places[stray][0]}")


class Tensor(NamedTuple):
    """What a tensor map says: sizes and strides in elements, slowest first; the box that is copied at a time.

    Attributes:
      buffer: which of a kernel's arrays it is of.
      item: bytes of an element.
      swizzle: bytes over which a row of the box is permuted in shared memory; 0 for none.
    """

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    item: int
    swizzle: int


@dataclass
class Copy:
    """Bytes on their way: of each, where it is in global and in shared memory, and whether it is inside the tensor."""

    outer: np.ndarray
    inner: np.ndarray
    inside: np.ndarray

    def load(self, memory: Global, shared: np.ndarray) -> None:
        """To shared memory; zeros for what is outside the tensor ("Out of bounds")."""
        shared[self.inner] = 0
        shared[self.inner[self.inside]] = memory.bytes[self.outer[self.inside]]

    def store(self, memory: Global, shared: np.ndarray) -> None:
        """From shared memory; what is outside the tensor is left out."""
        memory.bytes[self.outer[self.inside]] = shared[self.inner[self.inside]]


def box(memory: Global, tensor: Tensor, coordinates: list[int], inner: int) -> Copy:
    """The copy of a box, its first element at `coordinates`, fastest first."""
    if len(coordinates) != len(tensor.box):
        raise Fault(f"{len(coordinates)} coordinates of a tensor of {len(tensor.box)} dimensions")
    row = tensor.box[-1] * tensor.item
    if inner % 128 or row % 16 or (tensor.swizzle and row > tensor.swizzle):
        raise Fault(f"rows of {row} bytes, swizzled by {tensor.swizzle}, at {inner}")
    if not all(0 < n <= 256 for n in tensor.box):
        raise Fault(f"a box of {tensor.box}")
    if any(stride * tensor.item % 16 for stride in tensor.strides[:-1]) or tensor.strides[-1] != 1:
        raise Fault(f"strides of {tensor.strides} elements of {tensor.item} bytes")
    index = np.indices(tensor.box).reshape(len(tensor.box), -1)
    index += np.array(coordinates[::-1])[:, None]
    inside = ((index >= 0) & (index < np.array(tensor.shape)[:, None])).all(axis=0)
    start = memory.bases[tensor.buffer] + (index * np.array(tensor.strides)[:, None]).sum(axis=0) * tensor.item
    byte = np.arange(tensor.item)
    outer, inside = (start[:, None] + byte).reshape(-1), np.repeat(inside, tensor.item)
    memory.check(outer[inside], "copy")
    return Copy(outer, swizzled(inner + np.arange(math.prod(tensor.box) * tensor.item), tensor.swizzle), inside)


def run(memory: Global, outer: int, inner: int, size: int) -> Copy:
    """The copy of consecutive bytes ("cp.async.bulk")."""
    if outer % 16 or inner % 16 or size % 16:
        raise Fault(f"a copy of {size} bytes from {inner} to {outer}: not multiples of 16")
    places = np.arange(size)
    memory.check(outer + places, "copy")
    return Copy(outer + places, inner + places, np.ones(size, bool))
