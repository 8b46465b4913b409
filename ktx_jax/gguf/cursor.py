# SPDX-License-Identifier: Apache-2.0
"""Bounded reads from the mapped bytes of a GGUF header.

A header's counts and lengths are claims. Each is compared with the bytes that are left before anything is
read, sliced or allocated for it, so the work never exceeds what the file's own size allows.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from ktx_jax.gguf.errors import GGUFError, quote

# A 160,000-token vocabulary with its merges takes 10 MB. The bound keeps a hostile file of many gigabytes
# from being turned, value by value, into Python objects.
MAX_HEADER_BYTES = 32 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_SCALARS = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("<u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


class Cursor:
    """A position in the header of `path`, moving forward over `data` and never past its end.

    Every method that reads takes `what`, the words for an error: "the name of tensor 3". All raise
    `GGUFError`.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.pos = 0

    def take(self, nbytes: int, what: str) -> int:
        """Claims the next `nbytes` bytes and returns where they start."""
        start = self.pos
        if nbytes > self.limit - start:
            if start + nbytes <= self.size:
                raise GGUFError(
                    f"{self.path}: {what} would make the header larger than {MAX_HEADER_BYTES >> 20} MiB; "
                    "no known model needs that, so the file is refused as damaged"
                )
            raise GGUFError(
                f"{self.path}: {what} takes {nbytes} bytes at offset {start}, but the file ends at "
                f"{self.size}: the download is cut short, or the header is damaged; download it again"
            )
        self.pos = start + nbytes
        return start

    def u32(self, what: str) -> int:
        """The next unsigned 32-bit integer."""
        return _U32.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        """The next unsigned 64-bit integer."""
        return _U64.unpack_from(self.data, self.take(8, what))[0]

    def string(self, what: str) -> str:
        """The next string: a 64-bit length and as many bytes of UTF-8."""
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        return self._decode(start, self.pos, what)

    def value(self, what: str) -> tuple[GGUFValueType, Any]:
        """The next metadata value, with the type id before it: a Python scalar, str, or list of them."""
        kind = self._value_type(what)
        if kind is GGUFValueType.STRING:
            return kind, self.string(what)
        if kind is not GGUFValueType.ARRAY:
            return kind, self._numbers(kind, 1, what)[0]
        item = self._value_type(f"an item of {what}")
        count = self.u64(f"the length of {what}")
        if item is GGUFValueType.ARRAY:
            raise GGUFError(f"{self.path}: {what} is an array of arrays; nested arrays are not supported")
        if item is GGUFValueType.STRING:
            return kind, self._strings(count, what)
        return kind, self._numbers(item, count, what)

    def _value_type(self, what: str) -> GGUFValueType:
        number = self.u32(f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise GGUFError(
                f"{self.path}: {what} has the unknown value type {number}; GGUF defines 0 to "
                f"{max(GGUFValueType)}: the header is damaged, or newer than this program"
            ) from None

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> list:
        dtype = _SCALARS[kind]
        start = self.take(count * dtype.itemsize, what)
        if count == 0:
            return []
        items = np.frombuffer(self.data, dtype, count, start)
        if kind is GGUFValueType.BOOL:
            if items.max() > 1:
                raise GGUFError(f"{self.path}: {what} is a bool stored as {items.max()}; only 0 and 1 are")
            items = items.astype(np.bool_)
        return items.tolist()

    def _strings(self, count: int, what: str) -> list[str]:
        # Vocabularies come through here, 200,000 strings in all: one flat loop, nothing called but builtins.
        if count > (self.limit - self.pos) // 8:
            self.take(8 * count, f"{what}, an array of {count} strings,")
        data, limit, pos, unpack = self.data, self.limit, self.pos, _U64.unpack_from
        items: list[str] = []
        for index in range(count):
            start = pos + 8
            if start > limit or (pos := start + unpack(data, pos)[0]) > limit:
                self.pos = start - 8
                self.string(f"item {index} of {what}")  # raises: says what does not fit
            try:
                items.append(data[start:pos].decode())
            except UnicodeDecodeError:
                self._decode(start, pos, f"item {index} of {what}")
        self.pos = pos
        return items

    def _decode(self, start: int, end: int, what: str) -> str:
        try:
            return self.data[start:end].decode()
        except UnicodeDecodeError as error:
            shown = quote(self.data[start : min(end, start + 64)].decode(errors="backslashreplace"))
            raise GGUFError(
                f"{self.path}: {what} is not valid UTF-8 (byte {error.start} of {end - start}): {shown}"
            ) from None
