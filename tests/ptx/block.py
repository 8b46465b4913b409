# SPDX-License-Identifier: Apache-2.0
"""A block of threads: its warps in an order drawn at random, and what they share."""

import random
from typing import NamedTuple

from .barriers import Mbarrier, NamedBarrier
from .shared import Shared
from .tensors import Copy, Global, Tensor
from .text import Fault, Program
from .warp import Blocked, Warp


class Schedule(NamedTuple):
    """In what order things happen.

    Attributes:
      late_copies: a copy to shared memory lands when somebody waits for it, and not at once; late_products: likewise.
      switches: the chance that a warp lets others go first, before each instruction.
    """

    seed: int = 0
    late_copies: bool = True
    late_products: bool = True
    switches: float = 0.003


class Block:
    """One block of a kernel.

    Attributes:
      index: of the block in the grid.
      parameters: the addresses that a kernel is given.
    """

    def __init__(
        self,
        program: Program,
        warps: int,
        shared_bytes: int,
        index: tuple[int, ...],
        memory: Global,
        parameters: list[int],
        tensors: list[Tensor],
        schedule: Schedule,
    ) -> None:
        self.program, self.index, self.memory = program, index, memory
        self.parameters, self.tensors, self.schedule = parameters, tensors, schedule
        self.random = random.Random(f"{schedule.seed} {index}")
        self.shared = Shared(shared_bytes, warps)
        self.mbarriers: dict[int, Mbarrier] = {}
        self._named: dict[int, NamedBarrier] = {}
        self._landed = False
        self.warps = [Warp(self, w) for w in range(warps)]

    def run(self) -> None:
        """Until all warps have returned."""
        running = {warp.index: warp.run() for warp in self.warps}
        blocked: dict[int, Blocked] = {}
        while running:
            order = list(running)
            self.random.shuffle(order)
            moved = self._landed = False
            for index in order:
                if index in blocked and not blocked[index]():
                    continue
                blocked.pop(index, None)
                moved = True
                try:
                    waits = next(running[index])
                except StopIteration:
                    del running[index]
                else:
                    if waits is not None:
                        blocked[index] = waits
            if not moved and not self._landed:
                raise Fault(self._deadlock(running))
        for barrier in (*self.mbarriers.values(), *self._named.values()):
            barrier.check_idle()
        self.warps.clear()  # they refer to the block: both can go now

    def _deadlock(self, running: dict) -> str:
        instructions = self.program.instructions
        return "deadlock: " + ", ".join(f"warp {w} at {instructions[self.warps[w].at - 1].text}" for w in running)

    def named_barrier(self, number: int, threads: int) -> NamedBarrier:
        return self._named.setdefault(number, NamedBarrier(threads, self.shared.agents))

    def new_mbarrier(self, place: int, count: int) -> None:
        if place % 8 or place in self.mbarriers:
            raise Fault(f"an mbarrier at {place}, misaligned or there before")
        self.mbarriers[place] = Mbarrier(len(self.mbarriers), count, self.shared.agents)

    def start(self, copy: Copy, barrier: Mbarrier) -> None:
        """A copy to shared memory that completes on a barrier."""

        def land() -> None:
            copy.load(self.memory, self.shared.bytes)
            barrier.complete(len(copy.inner), self.shared.agent(barrier.number))

        if self.schedule.late_copies:
            barrier.delayed.append(land)
        else:
            land()

    def over(self, barrier: Mbarrier, parity: int) -> bool:
        """Whether a phase is over; if only copies are missing, one of them lands."""
        if not barrier.is_over(parity) and barrier.delayed and not barrier.pending:
            barrier.delayed.pop(self.random.randrange(len(barrier.delayed)))()
            self._landed = True
        return barrier.is_over(parity)
