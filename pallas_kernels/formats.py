# SPDX-License-Identifier: Apache-2.0
"""How quantized weights lie in a GPU's memory: records of 64 rows, in the order in which a warpgroup reads them.

A weight `[*lead, N, K]` becomes one int32 array `[*lead, N/64, K/depth, rows, 64]`. A record covers 64 rows and `depth`
columns (a super-block, or 64 for the formats with blocks of 32) and is a stack of planes, each some rows of 64 words:

    quants   for each 64 x 64 tile: nibbles (8 rows), bytes (16) or bfloat16 pairs (32)
    high     for each 64 x 64 tile: the fifth bits (2 rows) or the fifth and sixth (4)
    scales   a word for each of the 64 weight rows: small scales and minima, or two float16 scales
    factors  a word for each of the 64 weight rows: float16 d, and dmin above it

The order of the quants is that of the left operand of Hopper's matrix instruction (wgmma m64k16, PTX ISA "register
fragments"): thread t of 128 holds, of columns 16j..16j+15, the pairs (row r or r + 8, columns c, c + 1 or c + 8, c + 9)
with r = 16 (t / 32) + (t % 32) / 4 and c = 16 j + 2 (t % 4). A pair is two fields 16 bits apart in a word, so that one
shift and one logical operation make two bfloat16 numbers, and no value ever moves from one thread to another.
"""

from dataclasses import dataclass

ROWS = 64
"""Weight rows of a record: the rows of a wgmma."""

LEAST_ROWS = 128
"""The fewest rows of a weight for which there is a kernel at every number of tokens: a block of prefill has as many."""

TILE = 64
"""Columns of a tile: four wgmma steps of 16."""


@dataclass(frozen=True)
class Format:
    """One record layout.

    Attributes:
      name: the ggml type.
      depth: columns a record covers.
      group: columns that share a scale.
      quant_rows, high_rows: rows of 64 words a 64 x 64 tile takes in those planes.
      scale_rows, factor_rows: rows of 64 words a record takes in those.
      minima: whether a group has a minimum to subtract.
      zero: what is subtracted from a quant as stored.
      block, block_bytes: values and bytes of a block in the file.
    """

    name: str
    depth: int
    group: int
    quant_rows: int
    high_rows: int
    scale_rows: int
    factor_rows: int
    minima: bool
    zero: int
    block: int
    block_bytes: int

    @property
    def tiles(self) -> int:
        """64 x 64 tiles of a record."""
        return self.depth // TILE

    @property
    def groups(self) -> int:
        """Groups along a tile's 64 columns."""
        return TILE // self.group

    @property
    def high_at(self) -> int:
        """The record's first row of high bits."""
        return self.tiles * self.quant_rows

    @property
    def scale_at(self) -> int:
        """The record's first row of scales."""
        return self.high_at + self.tiles * self.high_rows

    @property
    def factor_at(self) -> int:
        """The record's row of factors."""
        return self.scale_at + self.scale_rows

    @property
    def rows(self) -> int:
        """Rows of 64 words of a record."""
        return self.factor_at + self.factor_rows

    @property
    def bytes(self) -> int:
        """Bytes of a record."""
        return self.rows * 64 * 4

    @property
    def growth(self) -> float:
        """A record's bytes over those of the file's blocks it was made from."""
        return self.bytes / (ROWS * self.depth // self.block * self.block_bytes)

    def record_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the records of a weight `shape`.

        Raises `NotImplementedError` for sizes that records do not divide.
        """
        *lead, n, k = shape
        if n % ROWS:
            raise NotImplementedError(f"{self.name} records take rows in 64s: a weight of shape {shape} has {n}")
        if k % self.depth:
            raise NotImplementedError(
                f"{self.name} records take columns in {self.depth}s: a weight of shape {shape} has {k}"
            )
        return (*lead, n // ROWS, k // self.depth, self.rows, 64)

    def weight_shape(self, records: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight that an array of records of shape `records` stands for."""
        *lead, n, k, rows, words = records
        if (rows, words) != (self.rows, 64):
            raise ValueError(f"{self.name} records are ({self.rows}, 64); the array's last axes are ({rows}, {words})")
        return (*lead, n * ROWS, k * self.depth)


FORMATS = {
    f.name: f
    for f in (
        Format("Q4_0", 64, 32, 8, 0, 1, 0, False, 8, 32, 18),
        Format("Q5_0", 64, 32, 8, 2, 1, 0, False, 16, 32, 22),
        Format("Q8_0", 64, 32, 16, 0, 1, 0, False, 0, 32, 34),
        Format("Q4_K", 256, 32, 8, 0, 4, 1, True, 0, 256, 144),
        Format("Q5_K", 256, 32, 8, 2, 4, 1, True, 0, 256, 176),
        Format("Q6_K", 256, 16, 8, 4, 4, 1, False, 32, 256, 210),
        Format("IQ4_XS", 256, 32, 8, 0, 2, 1, False, 0, 256, 136),
        Format("BF16", 64, 64, 32, 0, 0, 0, False, 0, 1, 2),
    )
}
"""The formats the GPU kernels read, by ggml name. Others are converted while loading."""

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of IQ4_XS quants, in units of the group's scale."""


def format_of(name: str) -> Format:
    """The record layout of a ggml type.

    Raises `NotImplementedError` for a type that has none.
    """
    if name not in FORMATS:
        raise NotImplementedError(f"no GPU layout for {name}: the kernels read {', '.join(FORMATS)}")
    return FORMATS[name]
