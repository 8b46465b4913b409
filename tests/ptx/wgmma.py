# SPDX-License-Identifier: Apache-2.0
"""`wgmma.mma_async` ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operations"): D += A * B.

Each of a warpgroup's four warps has 16 of D's 64 rows.

Assumption: a warp's product reads all 64 rows of an A in shared memory, as PTX does not say that it reads its own only.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import bfloat16_values, halves
from .shared import swizzled
from .text import Fault, Instruction

if TYPE_CHECKING:
    from .warp import Warp

_LANE = np.arange(32)
_ROW, _COLUMN = _LANE // 4, 2 * (_LANE % 4)  # of a lane's first element in each 8 x 8 of a fragment
_DEPTH = 16  # bfloat16 columns of A that one instruction takes


class Product:
    """A product that has been started: its operands, and what it does once it is done."""

    def __init__(self, warp: "Warp", i: Instruction) -> None:
        shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", i.name)
        if shape is None:
            raise NotImplementedError(i.name)
        self.warp, self.columns = warp, int(shape[1])
        self.sums, self.left, right, counts, scale_a, scale_b, *transposed = i.operands
        if len(self.sums) != self.columns // 2 or (scale_a, scale_b) != ("1", "1"):
            raise NotImplementedError(i.text)
        fragment = isinstance(self.left, tuple)
        self.registers = {*self.sums, *(self.left if fragment else ())}
        self._adds = bool(warp.read(counts, np.uint32)[0])
        self._right = int(warp.uniform(right, np.uint64)), transposed[-1] == "1"
        self._left = None if fragment else (int(warp.uniform(self.left, np.uint64)), transposed[0] == "1")
        self._values = [warp.read(r, np.uint32).copy() for r in self.left] if fragment else None

    def finish(self) -> None:
        """Reads what is in shared memory, and writes the sums."""
        warp, first = self.warp, 16 * (self.warp.index % 4)
        a = self._fragment() if self._left is None else self._matrix(*self._left, 64)[first : first + 16]
        b = self._matrix(*self._right, self.columns)
        with np.errstate(all="ignore"):
            product = a.astype(np.float64) @ b.astype(np.float64).T
            for n, register in enumerate(self.sums):  # "Register Fragments": accumulator D
                part = product[_ROW + 8 * (n // 2 % 2), 8 * (n // 4) + _COLUMN + n % 2]
                before = warp.registers[register].view(np.float32) if self._adds else 0.0
                warp.registers[register] = (before + part).astype(np.float32).view(np.uint32)

    def _fragment(self) -> np.ndarray:
        """A's 16 rows in four registers of two columns each ("Register Fragments": matrix A)."""
        out = np.zeros((16, _DEPTH), np.float32)
        for n, words in enumerate(self._values or ()):
            if not np.array_equal(self.warp.registers[self.left[n]], words):
                raise Fault(f"{self.left[n]} has changed while a product read it")
            for odd, half in enumerate(halves(words)):
                out[_ROW + 8 * (n % 2), _COLUMN + 8 * (n // 2) + odd] = bfloat16_values(half)
        return out

    def _matrix(self, descriptor: int, by_columns: bool, rows: int) -> np.ndarray:
        """`[rows, 16]` at a "Matrix Descriptor", K-major or MN-major ("Strides", "Canonical Layouts")."""
        start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
        if width is None or descriptor >> 49 & 7:
            raise NotImplementedError(f"a matrix descriptor without swizzle, or with an offset: {descriptor:#x}")
        row, k = np.arange(rows)[:, None], np.arange(_DEPTH)[None]
        if by_columns:
            each = width // 2
            places = start + row // each * leading + k // 8 * stride + k % 8 * width + row % each * 2
        else:
            places = start + row // 8 * stride + row % 8 * width + k * 2
        places = swizzled(places, width)
        shared = self.warp.block.shared
        shared.read(places, self.warp.index, self.warp.clock, "product", asynchronous=True)
        return bfloat16_values(shared.bytes[places] | shared.bytes[places + 1].astype(np.uint16) << 8)


class Products:
    """A warp's products under way ("Asynchronous Multiply-and-Accumulate: wgmma.fence, commit_group, wait_group")."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.unfenced: set[str] = set()  # registers written since the last wgmma.fence
        self.busy: set[str] = set()  # registers of products under way
        self._open: list[Product] = []
        self._groups: list[list[Product]] = []

    def start(self, product: Product) -> None:
        """Accumulators that an earlier product under way adds to need no fence; all else does."""
        if missing := product.registers & self.unfenced:
            raise Fault(f"a product of registers written without wgmma.fence: {sorted(missing)[:3]}")
        self._open.append(product)
        self.busy |= product.registers
        if not self.late:
            product.finish()

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, most: int) -> None:
        """Until at most so many groups are under way."""
        while len(self._groups) > most:
            for product in self._groups.pop(0):
                if self.late:
                    product.finish()
        self.busy = {r for group in (*self._groups, self._open) for product in group for r in product.registers}

    def check_idle(self) -> None:
        if self._open or self._groups:
            raise Fault("a warp ends with a product under way")
