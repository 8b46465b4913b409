# SPDX-License-Identifier: Apache-2.0
"""mbarriers ("Parallel Synchronization and Communication Instructions: mbarrier") and named barriers ("bar")."""

from collections.abc import Callable

import numpy as np

from .shared import Clock
from .text import Fault

_MOST_BYTES = (1 << 20) - 1


class Mbarrier:
    """Counts arrivals and bytes to come; when none is left of either, its phase ends and the next begins.

    Attributes:
      number: which of the block's it is.
      delayed: copies that have been started and that complete on it, as functions that do them.
      ends: of each phase that has ended, what its arrivals had seen.
    """

    def __init__(self, number: int, count: int, agents: int) -> None:
        self.number, self.count, self.agents = number, count, agents
        self.pending, self.bytes, self.phase = count, 0, 0
        self.delayed: list[Callable[[], None]] = []
        self.ends: list[np.ndarray] = []
        self._clock = Clock(agents)

    def arrive(self, threads: int, clock: Clock) -> None:
        if threads > self.pending:
            raise Fault(f"{threads} arrivals at a barrier that expects {self.pending}")
        self.pending -= threads
        self._clock.learn(clock.seen)
        self.end_if_complete()

    def expect(self, count: int) -> None:
        self.bytes += count
        if abs(self.bytes) > _MOST_BYTES:
            raise Fault(f"a barrier that expects {self.bytes} bytes")

    def complete(self, count: int, agent: int) -> None:
        """A copy of so many bytes, by the agent of this barrier's copies, has landed."""
        self.expect(-count)
        self._clock.seen[agent] = self.phase + 1
        self.end_if_complete()

    def end_if_complete(self) -> None:
        if self.pending == self.bytes == 0:
            self.ends.append(self._clock.seen)
            self._clock = Clock(self.agents)
            self.phase, self.pending = self.phase + 1, self.count

    def is_over(self, parity: int) -> bool:
        """Whether the phase of that parity, the current one or that before, has ended."""
        return self.phase % 2 != parity

    def last_end(self) -> np.ndarray:
        """What is known to whoever waited for the phase before the current one."""
        return self.ends[-1] if self.ends else np.zeros(self.agents, np.int32)

    def check_idle(self) -> None:
        if self.delayed or self.bytes:
            raise Fault("a block ends with a copy under way")
        if self.pending != self.count:
            raise Fault("a block ends with a barrier half arrived at")


class NamedBarrier:
    """`bar.sync`: so many threads wait for each other."""

    def __init__(self, threads: int, agents: int) -> None:
        self.threads, self.agents = threads, agents
        self.generation, self._here = 0, 0
        self._clock = Clock(agents)
        self.ends: list[np.ndarray] = []

    def arrive(self, threads: int, clock: Clock) -> int:
        """The generation that ends with the last of them."""
        if threads != self.threads:
            raise Fault(f"a barrier of {self.threads} threads and of {threads}")
        generation = self.generation
        self._here += 32
        self._clock.learn(clock.seen)
        if self._here == self.threads:
            self.ends.append(self._clock.seen)
            self._clock, self._here = Clock(self.agents), 0
            self.generation += 1
        return generation

    def check_idle(self) -> None:
        if self._here:
            raise Fault("a block ends with a barrier half arrived at")
