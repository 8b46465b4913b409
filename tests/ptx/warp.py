# SPDX-License-Identifier: Apache-2.0
"""A warp: 32 lanes in step, and the instructions that are more than arithmetic."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import LANES, OPERATIONS, halves, joined
from .barriers import Mbarrier
from .shared import BASE, Clock
from .tensors import Copy, box, run
from .text import Address, Fault, Instruction
from .wgmma import Product, Products

if TYPE_CHECKING:
    from .block import Block

TENSOR_MAPS = 1 << 60
"""Where a kernel's tensor maps lie, `MAP_BYTES` each: a parameter by value."""

MAP_BYTES = 128

Blocked = Callable[[], bool]
"""Whether what a warp waits for has come."""

# Nothing to do where warps are in step, registers without end, and what is begun before a barrier seen after it.
_NOTHING = ("fence.mbarrier_init", "prefetch.tensormap", "setmaxnreg", "bar.warp.sync")


class Warp:
    """Registers hold 32 unsigned numbers, or truths."""

    def __init__(self, block: "Block", index: int) -> None:
        self.block, self.index = block, index
        self.registers: dict[str, np.ndarray] = {}
        self.clock = Clock(block.shared.agents)
        self.clock.seen[index] = 1
        self.products = Products(block.schedule.late_products)
        self.at = 0  # of the next instruction
        self._leader = block.random.randrange(32)
        self._copies: list[Copy] = []
        self._copy_groups: list[list[Copy]] = []

    # Operands.

    def read(self, operand: str, kind: np.typing.DTypeLike) -> np.ndarray:
        """A register, literal or symbol as 32 numbers of a type."""
        kind = np.dtype(kind)
        if operand[0] == "%":
            value = self._register(operand)
            if bool in (value.dtype, kind):
                return value
            if value.itemsize != kind.itemsize:  # widened without a sign, or its low bits
                value = value.astype(f"u{kind.itemsize}")
            return value.view(kind)
        if operand[:2] == "0f":
            return np.full(32, int(operand[2:], 16), np.uint32).view(kind)
        if operand.startswith("__dynamic_shmem"):
            return np.full(32, BASE, kind)
        if "_param_" in operand:
            return np.full(32, TENSOR_MAPS, kind)
        number = int(operand, 0)
        if kind.kind == "b":
            return np.full(32, bool(number))
        return np.full(32, number & (1 << 8 * kind.itemsize) - 1, f"u{kind.itemsize}").view(kind)

    def _register(self, name: str) -> np.ndarray:
        if name == "%tid.x":
            return (self.index * 32 + LANES).astype(np.uint32)
        if name.startswith("%ctaid."):
            return np.full(32, self.block.index["xyz".index(name[-1])], np.uint32)
        if name in self.products.busy:
            raise Fault(f"{name} is read while a product is under way that has it")
        return self.registers[name]

    def uniform(self, operand: str, kind: np.typing.DTypeLike) -> np.generic:
        """What is the same in all lanes."""
        values = self.read(operand, kind)
        if (values != values[0]).any():
            raise Fault(f"{operand} differs between lanes")
        return values[0]

    def write(self, name: str, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        if name in self.products.busy:
            raise Fault(f"{name} is written while a product is under way that has it")
        if values.dtype != bool:
            values = np.ascontiguousarray(values).view(f"u{values.itemsize}")
        if mask is not None and not mask.all():
            values = np.where(mask, values, self.registers.get(name, np.zeros_like(values)))
        self.registers[name] = values
        self.products.unfenced.add(name)

    def _places(self, address: Address) -> np.ndarray:
        return self.read(address.base, np.uint64).astype(np.int64) + address.offset

    # Execution.

    def run(self) -> Iterator[Blocked | None]:
        """Yields what it waits for, or None to let others go first."""
        instructions, schedule = self.block.program.instructions, self.block.schedule
        while True:
            i = instructions[self.at]
            mask = None if i.predicate is None else self.registers[i.predicate] ^ i.negated
            if self.block.random.random() < schedule.switches:
                yield None
            if i.parts[0] == "ret" and (mask is None or mask.all()):
                self._check_idle()
                return
            try:
                blocked = self._step(i, mask)
            except (Fault, NotImplementedError) as error:
                error.add_note(f"block {self.block.index}, warp {self.index}, instruction {self.at}: {i.text}")
                raise
            self.at += 1
            if blocked is not None:
                while not blocked[0]():
                    yield blocked[0]
                self.clock.learn(blocked[1]())

    def _step(self, i: Instruction, mask: np.ndarray | None) -> tuple[Blocked, Callable[[], np.ndarray]] | None:
        """Does an instruction; gives, of one that waits, for what, and what is known after."""
        kind = i.parts[0]
        if kind in OPERATIONS:
            if isinstance(i.operands[0], tuple):  # mov of one register to two
                for name, half in zip(i.operands[0], halves(self.read(i.operands[1], np.uint32)), strict=True):
                    self.write(name, half, mask)
            else:
                self.write(i.operands[0], OPERATIONS[kind](self.read, i), mask)
        elif kind == "bra":
            self._branch(i, mask)
        elif kind in ("ld", "st"):
            self._access(i, np.ones(32, bool) if mask is None else mask)
        elif kind in ("ldmatrix", "stmatrix") and mask is None:
            self._matrices(i)
        elif kind == "elect":
            number, truth = i.operands[0].split("|")
            self.write(number, np.full(32, self._leader, np.uint32))
            self.write(truth, self._leader == LANES)
        elif kind in ("mbarrier", "bar") and not i.name.startswith(_NOTHING):
            return self._synchronize(i, mask)
        elif kind in ("cp", "wgmma", "fence"):
            self._asynchronous(i, mask)
        elif not i.name.startswith(_NOTHING):
            raise NotImplementedError(i.name)
        return None

    def _branch(self, i: Instruction, mask: np.ndarray | None) -> None:
        if mask is not None and mask.any() != mask.all():
            raise Fault("lanes of a warp part ways")
        if mask is None or mask[0]:
            self.at = self.block.program.labels[i.operands[0]] - 1

    # Memory.

    def _access(self, i: Instruction, mask: np.ndarray) -> None:
        """`ld` and `st`: vectors lie at multiples of their size ("Alignment")."""
        loads = i.parts[0] == "ld"
        address, registers = i.operands[::-1] if loads else i.operands
        if i.parts[1].startswith("param"):
            parameter = self.block.parameters[int(re.search(r"_param_(\d+)", address.base)[1])]
            return self.write(registers, np.full(32, parameter, np.uint64))
        registers = registers if isinstance(registers, tuple) else (registers,)
        size = int(i.parts[-1][1:]) // 8
        places = self._places(address)[:, None] + np.arange(size * len(registers))
        if (places[mask, 0] % (size * len(registers))).any():
            raise Fault(f"an address that {size * len(registers)} does not divide")
        if i.parts[1] == "shared":
            self._touch(places[mask], not loads, i.name)
            memory = self.block.shared.bytes
        else:
            self.block.memory.check(places[mask].reshape(-1), i.name)
            memory = self.block.memory.bytes
        for n, name in enumerate(registers):
            part = places[:, size * n : size * (n + 1)]
            if loads:
                values = np.zeros((32, size), np.uint8)
                values[mask] = memory[part[mask]]
                self.write(name, values.view(f"u{size}")[:, 0], mask)
            else:
                memory[part[mask]] = self.read(name, f"u{size}").view(np.uint8).reshape(32, size)[mask]

    def _touch(self, places: np.ndarray, writes: bool, what: str) -> None:
        if places.size:
            shared = self.block.shared
            (shared.write if writes else shared.read)(places, self.index, self.clock, what)

    def _matrices(self, i: Instruction) -> None:
        """`ldmatrix` and `stmatrix`: 8 x 8 elements of 16 bits; the n-th eight lanes hold the rows' addresses."""
        count = {"x1": 1, "x2": 2, "x4": 4}.get(i.parts[4])
        if i.parts[3] != "m8n8" or i.parts[-1] != "b16" or count is None or "shared" not in i.name:
            raise NotImplementedError(i.name)
        loads = i.parts[0] == "ldmatrix"
        address, registers = i.operands[::-1] if loads else i.operands
        registers = registers if isinstance(registers, tuple) else (registers,)
        starts, memory = self._places(address), self.block.shared.bytes
        for n, name in enumerate(registers):
            rows = starts[8 * n : 8 * n + 8]
            if (rows % 16).any():
                raise Fault("an address that 16 does not divide")
            pair = 2 * (LANES % 4)[:, None] + np.arange(2)
            row, column = (pair, LANES[:, None] // 4) if "trans" in i.parts else (LANES[:, None] // 4, pair)
            places = (rows[row] + 2 * column)[..., None] + np.arange(2)  # [lane, element, byte]
            self._touch(places, not loads, i.name)
            if loads:
                self.write(name, joined(*memory[places].view(np.uint16)[..., 0].T))
            else:
                memory[places] = self.read(name, np.uint32).view(np.uint8).reshape(32, 2, 2)

    # Barriers.

    def _synchronize(self, i: Instruction, mask: np.ndarray | None) -> tuple[Blocked, Callable] | None:
        if i.name == "bar.sync":
            threads = int(i.operands[1]) if len(i.operands) > 1 else 32 * len(self.block.warps)
            barrier = self.block.named_barrier(int(self.uniform(i.operands[0], np.uint32)), threads)
            generation = barrier.arrive(threads, self.clock)
            self.clock.seen[self.index] += 1
            return lambda: barrier.generation > generation, lambda: barrier.ends[generation]
        address = next(o for o in i.operands if isinstance(o, Address))
        place = int(np.unique(self._places(address)).item())
        if i.name.startswith("mbarrier.init.shared"):
            if mask is None or mask.any():
                self.block.new_mbarrier(place, int(self.uniform(i.operands[1], np.uint32)))
            return None
        barrier = self.block.mbarriers[place]
        if i.name.startswith("mbarrier.try_wait.parity.shared"):
            parity = int(self.uniform(i.operands[1], np.uint32))
            return lambda: self.block.over(barrier, parity), barrier.last_end
        threads = np.ones(32, bool) if mask is None else mask
        if i.name.startswith("mbarrier.arrive.expect_tx"):
            barrier.expect(int(self.read(i.operands[2], np.uint32)[threads].sum()))
        elif not i.name.startswith("mbarrier.arrive.release.cta") or i.operands[2] != "1":
            raise NotImplementedError(i.text)
        barrier.arrive(int(threads.sum()), self.clock)
        self.clock.seen[self.index] += 1
        return None

    # What happens beside the warp.

    def _asynchronous(self, i: Instruction, mask: np.ndarray | None) -> None:
        if i.name.startswith("fence.proxy.async"):
            self.block.shared.fence(self.index)
        elif i.name.startswith("wgmma.mma_async"):
            self.products.start(Product(self, i))
        elif i.name.startswith("wgmma.commit_group"):
            self.products.commit()
        elif i.name.startswith("wgmma.wait_group"):
            self.products.wait(int(i.operands[0]))
        elif i.name.startswith("wgmma.fence"):
            self.products.unfenced.clear()
        elif i.name == "cp.async.bulk.commit_group":
            self._copy_groups.append(self._copies)
            self._copies = []
        elif i.name.startswith("cp.async.bulk.wait_group"):
            self._store_copies(int(i.operands[0]))
        elif i.name.startswith("cp.async.bulk.") and mask is not None:
            if mask.sum() > 1:
                raise Fault("one copy started by several lanes")
            if mask.any():
                self._copy(i, int(np.argmax(mask)))
        elif not i.name.startswith(_NOTHING):
            raise NotImplementedError(i.name)

    def _copy(self, i: Instruction, lane: int) -> None:
        """Copies to shared memory complete on an mbarrier; those from it are waited for in groups."""

        def one(operand: Address | str, kind: type = np.int64) -> int:
            return int(self._places(operand)[lane] if isinstance(operand, Address) else self.read(operand, kind)[lane])

        target, source = i.operands[:2]
        if i.name.startswith("cp.async.bulk.global.shared::cta.bulk_group"):
            self._copies.append(run(self.block.memory, one(target), one(source), one(i.operands[2], np.uint32)))
            return
        loads = re.fullmatch(r"cp\.async\.bulk\.tensor\.\dd\.shared::(cluster|cta)\.global\.mbarrier::\S+", i.name)
        if loads is None and not re.fullmatch(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta\.bulk_group", i.name):
            raise NotImplementedError(i.name)
        outer, inner = (source, target) if loads else (target, source)
        tensor = self.block.tensors[(int(self.read(outer.base, np.uint64)[lane]) - TENSOR_MAPS) // MAP_BYTES]
        copy = box(self.block.memory, tensor, [one(c, np.int32) for c in outer.coordinates], one(inner))
        if loads is None:
            self._copies.append(copy)
            return
        barrier: Mbarrier = self.block.mbarriers[one(i.operands[2])]
        self.block.shared.write_by_copy(copy.inner, self.index, self.clock, barrier.number, barrier.phase)
        self.block.start(copy, barrier)

    def _store_copies(self, most: int) -> None:
        """Does what has been started of copies out of shared memory, until at most so many groups are left."""
        while len(self._copy_groups) > most:
            for copy in self._copy_groups.pop(0):
                self.block.shared.read(copy.inner, self.index, self.clock, "copy", asynchronous=True)
                copy.store(self.block.memory, self.block.shared.bytes)

    def _check_idle(self) -> None:
        self.products.check_idle()
        if self._copies or any(self._copy_groups):
            raise Fault("a warp ends with a copy under way")
