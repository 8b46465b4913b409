# SPDX-License-Identifier: Apache-2.0
"""The tensor table of a GGUF header: each tensor's shape, type and place in the file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ktx_jax.gguf.cursor import Cursor
from ktx_jax.gguf.errors import GGUFError, quote

MAX_DIMENSIONS = 4
_MAX_INT64 = 2**63 - 1

# Ids that ggml gave out and took back: the files are in circulation still.
_REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        name: its GGUF name, `blk.0.attn_norm.weight`.
        shape: logical, row-major: ggml's dimensions reversed, the input dimension last.
        ggml_type: how its values are stored.
        file: the part it lies in.
        offset: bytes from the start of that file.
        nbytes: length of its data, padding excluded.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    file: Path
    offset: int
    nbytes: int


def read_entry(cursor: Cursor, index: int) -> TensorInfo:
    """Reads the next entry of the tensor table. Its offset is still relative to the start of the data.

    Raises:
        GGUFError: the entry's name, dimensions or type cannot be.
    """
    name = cursor.string(f"the name of tensor {index}")
    if not name:
        raise GGUFError(f"{cursor.path}: tensor {index} has an empty name")
    where = f"{cursor.path}: tensor {quote(name)}"
    entry = f"the entry of tensor {quote(name)}"
    n_dims = cursor.u32(entry)
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise GGUFError(f"{where} has {n_dims} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    dims = [cursor.u64(entry) for _ in range(n_dims)]
    for axis, size in enumerate(dims):
        if not 1 <= size <= _MAX_INT64:
            signed = size if size <= _MAX_INT64 else size - 2**64
            raise GGUFError(f"{where} has size {signed} in dimension {axis}; sizes are at least 1")
    ggml_type = _ggml_type(where, cursor.u32(entry))
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    if dims[0] % block_size:
        raise GGUFError(
            f"{where} has rows of {dims[0]} values; {ggml_type.name} stores them in blocks of {block_size}, "
            "so a row must be a multiple of that"
        )
    nbytes = math.prod(dims) // block_size * type_size
    if max(nbytes, math.prod(dims)) > _MAX_INT64:
        raise GGUFError(f"{where} is of shape {tuple(reversed(dims))}: its size overflows 64 bits")
    offset = cursor.u64(entry)
    return TensorInfo(name, tuple(reversed(dims)), ggml_type, cursor.path, offset, nbytes)


def _ggml_type(where: str, number: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        pass
    removed = _REMOVED_TYPES.get(number)
    reason = f"is {removed}, which ggml has removed" if removed else "is unknown"
    known = ", ".join(f"{kind.value} {kind.name}" for kind in sorted(GGML_QUANT_SIZES))
    raise GGUFError(
        f"{where} has the ggml type {number}, which {reason}: get or make the model in another quantization. "
        f"Known: {known}"
    )


def locate_tensors(
    path: Path, entries: Sequence[TensorInfo], alignment: int, header_bytes: int, file_bytes: int
) -> tuple[TensorInfo, ...]:
    """Checks that the tensors lie one after another, aligned and inside the file; makes offsets absolute.

    Like ggml's own loader this allows neither gaps nor another order: both mean a damaged header.

    Args:
        path: the file, for errors.
        entries: the tensor table, offsets relative to the start of the data.
        alignment: bytes, a power of two.
        header_bytes: length of the header without its padding.
        file_bytes: length of the file.

    Raises:
        GGUFError: duplicate names, offsets that cannot be, or a file that is cut short.
    """
    data_start = _pad(header_bytes, alignment)
    located: dict[str, TensorInfo] = {}
    free = end = 0
    for entry in entries:
        where = f"{path}: tensor {quote(entry.name)}"
        if entry.name in located:
            raise GGUFError(f"{where} occurs twice")
        if entry.offset % alignment:
            raise GGUFError(f"{where} is at offset {entry.offset}, not a multiple of the alignment {alignment}")
        if entry.offset < free:
            raise GGUFError(
                f"{where} is at offset {entry.offset}, but the tensor before it ends at {free}: "
                "they overlap or are out of order; the header is damaged"
            )
        if entry.offset > free:
            outside = data_start + entry.offset + entry.nbytes > file_bytes
            place = f"outside the file of {file_bytes} bytes" if outside else "after a gap or out of order"
            raise GGUFError(
                f"{where} is at offset {entry.offset}, {place}: it belongs at {free}, right after the tensor "
                "before it; the header is damaged"
            )
        end = entry.offset + entry.nbytes
        free = _pad(end, alignment)
        located[entry.name] = replace(entry, offset=data_start + entry.offset)
    if located and data_start + end > file_bytes:
        raise GGUFError(
            f"{path}: the download is cut short: {file_bytes} of {data_start + end} bytes; "
            "resume the download, or get the file again"
        )
    return tuple(located.values())


def _pad(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
