# SPDX-License-Identifier: Apache-2.0
"""Writes small GGUF files for tests, right or deliberately wrong: every field can be given as it should not be."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ktx_jax.gguf.reader import GGUF, open_gguf

V = GGUFValueType
T = GGMLQuantizationType

SCALAR_FORMATS = {
    V.UINT8: "<B",
    V.INT8: "<b",
    V.UINT16: "<H",
    V.INT16: "<h",
    V.UINT32: "<I",
    V.INT32: "<i",
    V.FLOAT32: "<f",
    V.BOOL: "<?",
    V.UINT64: "<Q",
    V.INT64: "<q",
    V.FLOAT64: "<d",
}

ARCHITECTURE = ("general.architecture", V.STRING, "deepseek2")


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `dims` in ggml's order, the row length first."""

    name: str | bytes
    dims: Sequence[int] = (32,)
    kind: int = T.F32
    offset: int | None = None  # right after the tensor before
    data: bytes | None = None  # zeros


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return string(value) if kind == V.STRING else struct.pack(SCALAR_FORMATS[V(kind)], value)


def array(kind: int, items: Sequence[Any]) -> bytes:
    return u32(kind) + u64(len(items)) + b"".join(scalar(kind, item) for item in items)


def key_value(key: str | bytes, kind: int, value: Any) -> bytes:
    """One metadata entry. `kind` ARRAY takes (item kind, items); a value in bytes is written as it is."""
    if not isinstance(value, bytes):
        value = array(*value) if kind == V.ARRAY else scalar(kind, value)
    return string(key) + u32(kind) + value


def data_bytes(tensor: Tensor) -> int:
    """Length of a tensor's data; nothing for one whose type or size cannot be."""
    n = 1
    for size in tensor.dims:
        n *= size
    if tensor.kind not in T.__members__.values() or not 0 < n < 1 << 30:
        return 0
    block_size, type_size = GGML_QUANT_SIZES[T(tensor.kind)]
    return n // block_size * type_size


def gguf_bytes(
    metadata: Sequence[tuple[str | bytes, int, Any]] = (ARCHITECTURE,),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file. `alignment` is what it is laid out by; the key for it is the caller's to give."""
    out = [magic, u32(version)]
    out += [u64(len(tensors) if n_tensors is None else n_tensors)]
    out += [u64(len(metadata) if n_keys is None else n_keys)]
    out += [key_value(*entry) for entry in metadata]
    position, data = 0, []
    for tensor in tensors:
        offset = position if tensor.offset is None else tensor.offset
        dims = b"".join(u64(size % 2**64) for size in tensor.dims)
        out += [string(tensor.name), u32(len(tensor.dims)), dims, u32(tensor.kind), u64(offset)]
        raw = bytes(data_bytes(tensor)) if tensor.data is None else tensor.data
        raw += bytes(-len(raw) % alignment)
        data.append(raw)
        position += len(raw)
    header = b"".join(out)
    if tensors:
        header += bytes(-len(header) % alignment)
    return header + b"".join(data)


def open_bytes(content: bytes, folder: Path, name: str = "model.gguf") -> GGUF:
    """Writes `content` to `folder`/`name` and opens it."""
    path = folder / name
    path.write_bytes(content)
    return open_gguf(path)


def split_set(folder: Path, counts: Sequence[int] = (2, 1, 2), stem: str = "m") -> list[Path]:
    """A good split set with `counts` tensors a part, named t0, t1, ...; returns its files."""
    files, number = [], 0
    for index, count in enumerate(counts):
        metadata = [
            ("split.no", V.UINT16, index),
            ("split.count", V.UINT16, len(counts)),
            ("split.tensors.count", V.INT32, sum(counts)),
        ]
        if index == 0:
            metadata.insert(0, ARCHITECTURE)
        tensors = [Tensor(f"t{number + i}", data=bytes([number + i]) * 128) for i in range(count)]
        number += count
        files.append(folder / f"{stem}-{index + 1:05d}-of-{len(counts):05d}.gguf")
        files[-1].write_bytes(gguf_bytes(metadata, tensors))
    return files
