# SPDX-License-Identifier: Apache-2.0
"""Shared memory of a block, and which accesses of it are ordered ("Memory Consistency Model", "Async Proxy").

Each warp has a vector clock: how much it has seen of what every other did. An access that another's, one of them a
write, precedes without having been seen is a data race. Copies into shared memory are writes by the mbarrier that they
complete on: who waits for its phase has seen them.

Assumptions: lanes of a warp are in order; accesses are told apart by cells of two bytes; a proxy fence is executed by
the warp that wrote, before the barrier that orders the read (PTX would allow it later); what a copy overwrites needs
no fence after it was read, as in CUTLASS's pipelines.
"""

import numpy as np

from .text import Fault

BASE = 1024
"""Where dynamic shared memory begins: what lies below is nobody's."""

_CELL = 2
_BARRIERS = 64


class Clock:
    """What a warp, or an arrival at a barrier, has seen: of each agent, how many of its steps."""

    def __init__(self, agents: int) -> None:
        self.seen = np.zeros(agents, np.int32)

    def learn(self, other: np.ndarray) -> None:
        np.maximum(self.seen, other, out=self.seen)


class Shared:
    """Bytes, at first NaN in every type, and of each cell its last write and each warp's last read."""

    def __init__(self, size: int, warps: int) -> None:
        self.bytes = np.full(BASE + size, 0xFF, np.uint8)
        self.warps = warps
        self.agents = warps + _BARRIERS
        cells = len(self.bytes) // _CELL
        self._writer = np.full(cells, -1, np.int16)
        self._write_step = np.zeros(cells, np.int32)
        self._read_step = np.zeros((cells, warps), np.int32)
        self._unfenced = np.full(cells, -1, np.int16)  # the warp that wrote, with no proxy fence since

    def _cells(self, places: np.ndarray, what: str) -> np.ndarray:
        if places.min() < BASE or places.max() >= len(self.bytes):
            raise Fault(f"{what} outside of the block's shared memory, at {places.min()} to {places.max()}")
        return np.unique(places // _CELL)

    def read(self, places: np.ndarray, warp: int, clock: Clock, what: str, asynchronous: bool = False) -> None:
        """Of bytes, by a warp. Asynchronous: by the engine of copies, or of products, which needs a proxy fence."""
        cells = self._cells(places, what)
        if asynchronous and (self._unfenced[cells] >= 0).any():
            raise Fault(f"{what} of warp {warp} reads what was written without a proxy fence")
        self._check_writes(cells, warp, clock, what)
        self._read_step[cells, warp] = clock.seen[warp]

    def write(self, places: np.ndarray, warp: int, clock: Clock, what: str) -> None:
        """Of bytes, by a warp."""
        cells = self._cells(places, what)
        self._check_writes(cells, warp, clock, what)
        self._check_reads(cells, warp, clock, what, but=warp)
        self._writer[cells], self._write_step[cells] = warp, clock.seen[warp]
        self._unfenced[cells] = warp

    def write_by_copy(self, places: np.ndarray, warp: int, clock: Clock, barrier: int, phase: int) -> None:
        """Of bytes, by a copy that `warp` starts and that completes on a phase of a barrier."""
        cells = self._cells(places, "copy")
        self._check_writes(cells, warp, clock, "copy")
        self._check_reads(cells, warp, clock, "copy")
        self._writer[cells], self._write_step[cells] = self.agent(barrier), phase + 1
        self._unfenced[cells] = -1

    def agent(self, barrier: int) -> int:
        """Of the copies that complete on the block's so-manieth barrier."""
        if barrier >= _BARRIERS:
            raise NotImplementedError(f"more than {_BARRIERS} barriers")
        return self.warps + barrier

    def fence(self, warp: int) -> None:
        """`fence.proxy.async`: what the warp wrote may be read by copies and products."""
        self._unfenced[self._unfenced == warp] = -1

    def _check_writes(self, cells: np.ndarray, warp: int, clock: Clock, what: str) -> None:
        writer = self._writer[cells]
        unseen = (writer >= 0) & (self._write_step[cells] > clock.seen[writer]) & (writer != warp)
        if unseen.any():
            which = writer[unseen][0]
            who = f"warp {which}" if which < self.warps else "a copy"
            raise Fault(f"race: {what} of warp {warp} and a write by {who}, at {cells[unseen][0] * _CELL}")

    def _check_reads(self, cells: np.ndarray, warp: int, clock: Clock, what: str, but: int | None = None) -> None:
        unseen = self._read_step[cells] > clock.seen[: self.warps]
        if but is not None:
            unseen[:, but] = False
        if unseen.any():
            cell, reader = np.argwhere(unseen)[0]
            raise Fault(f"race: {what} of warp {warp} and a read by warp {reader}, at {cells[cell] * _CELL}")


def swizzled(places: np.ndarray, width: int) -> np.ndarray:
    """Where a tensor's bytes lie ("Tensor Swizzling Modes"): 16-byte pieces of 32, 64 or 128 exchanged by address."""
    rows = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return places ^ ((places >> 7 & rows) << 4)
