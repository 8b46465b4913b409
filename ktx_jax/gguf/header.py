# SPDX-License-Identifier: Apache-2.0
"""The header of one GGUF file: parsed and validated whole, before any of it is used.

Layout (ggml's `docs/gguf.md`, versions 2 and 3, little-endian): magic, version, tensor count, key count;
then the metadata, a key, a type and a value each; then for each tensor its name, dimensions, type and offset;
then, padded to the alignment, the tensors' data.

Every string must be UTF-8: names and keys, and values too. DeepSeek's vocabularies spell bytes as printable
characters, so a token that does not decode is damage, and would otherwise surface far away in the tokenizer.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from ktx_jax.gguf.cursor import Cursor
from ktx_jax.gguf.errors import GGUFError, quote
from ktx_jax.gguf.signature import check_signature
from ktx_jax.gguf.tensor_info import TensorInfo, locate_tensors, read_entry

DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65535

# The least that a key with a one-byte value, and a tensor of one dimension, take beside their names.
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class Header:
    """What one GGUF file says of itself: its metadata, and its tensors in file order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


def parse_header(path: Path, data: mmap.mmap) -> Header:
    """Parses and validates the header of the file `path`, mapped as `data`.

    Raises:
        GGUFError: anything in the header is malformed, or the file is shorter than its tensors need.
    """
    cursor = Cursor(path, data)
    check_signature(cursor)
    n_tensors = cursor.u64("the number of tensors")
    n_keys = cursor.u64("the number of metadata keys")
    least = n_keys * _MIN_KEY_BYTES + n_tensors * _MIN_TENSOR_BYTES
    cursor.take(least, f"a header of {n_keys} metadata keys and {n_tensors} tensors, as claimed,")
    cursor.pos -= least
    metadata, alignment = _read_metadata(cursor, n_keys)
    entries = [read_entry(cursor, index) for index in range(n_tensors)]
    tensors = locate_tensors(path, entries, alignment, header_bytes=cursor.pos, file_bytes=len(data))
    return Header(path, metadata, tensors)


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], int]:
    """The metadata, and the alignment it sets."""
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        what = f"metadata key {index}"
        key = cursor.string(what)
        if not key:
            raise GGUFError(f"{cursor.path}: {what} is empty")
        if len(key.encode()) > MAX_KEY_BYTES:
            raise GGUFError(f"{cursor.path}: {what} is {quote(key)}; GGUF allows {MAX_KEY_BYTES} bytes")
        if key in metadata:
            raise GGUFError(f"{cursor.path}: the metadata key {quote(key)} occurs twice")
        kind, value = cursor.value(f"the value of {quote(key)}")
        if key == "general.alignment":
            alignment = _check_alignment(cursor.path, kind, value)
        metadata[key] = value
    return metadata, alignment


def _check_alignment(path: Path, kind: GGUFValueType, value: Any) -> int:
    if kind is not GGUFValueType.UINT32:
        raise GGUFError(f"{path}: general.alignment has the type {kind.name}; it must be UINT32")
    if value == 0 or value & (value - 1):
        raise GGUFError(f"{path}: general.alignment is {value}; it must be a power of two")
    return value
