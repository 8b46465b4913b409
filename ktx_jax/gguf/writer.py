# SPDX-License-Identifier: Apache-2.0
"""Writing GGUF (version 3, little-endian), streaming: a file of any size without holding it in memory."""

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ktx_jax.errors import KtxError

ALIGNMENT = 32

_V = GGUFValueType
_SCALARS = {
    _V.UINT8: "B",
    _V.INT8: "b",
    _V.UINT16: "H",
    _V.INT16: "h",
    _V.UINT32: "I",
    _V.INT32: "i",
    _V.UINT64: "Q",
    _V.INT64: "q",
    _V.FLOAT32: "f",
    _V.FLOAT64: "d",
    _V.BOOL: "?",
}
_NUMPY = {
    "uint8": _V.UINT8,
    "int8": _V.INT8,
    "uint16": _V.UINT16,
    "int16": _V.INT16,
    "uint32": _V.UINT32,
    "int32": _V.INT32,
    "uint64": _V.UINT64,
    "int64": _V.INT64,
    "float32": _V.FLOAT32,
    "float64": _V.FLOAT64,
    "bool": _V.BOOL,
}


class TensorSource(NamedTuple):
    """A tensor to write: `blocks` is its raw blocks, or a function that yields them in order, in pieces of any size."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    blocks: np.ndarray | Callable[[], Iterable[np.ndarray]]


def tensor_nbytes(shape: Sequence[int], ggml_type: GGMLQuantizationType) -> int:
    """Bytes of a tensor's blocks. Raises `KtxError` where the block size does not divide the rows."""
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block_size:
        raise KtxError(f"{ggml_type.name} needs rows of a multiple of {block_size}; got shape {tuple(shape)}")
    count = 1
    for n in shape:
        count *= int(n)
    return count // block_size * type_size


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorSource],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a GGUF file and returns its size in bytes.

    Metadata values are str, bool, int (stored as uint32 where it fits, else int32 or 64 bits), float (float32), NumPy
    scalars (stored as their own type), and lists of one of these (ints as int32 where they fit). The data go to
    a temporary file beside `path` that takes its name when complete, so a file under that name is always whole.
    `progress(done, total)` is called with bytes of tensor data after each piece.

    Raises `KtxError` for a path that cannot be written, too little free space, duplicate names, a value that GGUF
    cannot hold, and a tensor whose blocks are not as many bytes as its shape and type say.
    """
    path = Path(path)
    tensors = list(tensors)
    if path.is_dir():
        raise KtxError(f"{path} is a directory; give the name of the file to write")
    if not path.parent.is_dir():
        raise KtxError(f"{path}: the directory {path.parent} does not exist")
    sizes = [tensor_nbytes(t.shape, t.ggml_type) for t in tensors]
    header = _header(metadata, tensors, sizes)
    size = len(header) + sum(_aligned(n) for n in sizes)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise KtxError(f"{path} takes {size / 1e9:.2f} GB; {path.parent} has {free / 1e9:.2f} GB free")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            done, total = 0, sum(sizes)
            for tensor, nbytes in zip(tensors, sizes, strict=True):
                for written in _write_tensor(file, tensor, nbytes):
                    if progress is not None:
                        progress(done + written, total)
                done += nbytes
                file.write(bytes(_aligned(nbytes) - nbytes))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _write_tensor(file: IO[bytes], tensor: TensorSource, nbytes: int) -> Iterable[int]:
    """Writes the pieces, yielding the bytes of the tensor written so far."""
    pieces = tensor.blocks() if callable(tensor.blocks) else (tensor.blocks,)
    written = 0
    for piece in pieces:
        if piece.dtype != np.uint8:
            raise KtxError(f"tensor {tensor.name}: blocks are raw bytes (uint8), not {piece.dtype}")
        written += piece.nbytes
        if written > nbytes:
            break
        file.write(np.ascontiguousarray(piece).data)
        yield written
    if written != nbytes:
        count = f"more than {nbytes}" if written > nbytes else str(written)
        raise KtxError(
            f"tensor {tensor.name} {tensor.shape} {tensor.ggml_type.name} is {nbytes} bytes; its blocks are {count}"
        )


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorSource], sizes: Sequence[int]) -> bytes:
    """Everything before the data, padded to the alignment."""
    names = [t.name for t in tensors]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise KtxError(f"tensors given twice: {', '.join(twice)}")
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key)
        try:
            out += _value(value)
        except (TypeError, struct.error, OverflowError) as error:
            raise KtxError(f"metadata {key}: GGUF cannot hold {str(value)[:80]!r} ({error})") from error
    offset = 0
    for tensor, nbytes in zip(tensors, sizes, strict=True):
        shape = tensor.shape
        out += _string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += struct.pack("<IQ", tensor.ggml_type, offset)
        offset += _aligned(nbytes)
    return bytes(out) + bytes(_aligned(len(out)) - len(out))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Type id and contents of a metadata value."""
    if isinstance(value, (list, tuple)):
        kind = _element_type(value)
        head = struct.pack("<IIQ", _V.ARRAY, kind, len(value))
        if kind == _V.STRING:
            return head + b"".join(map(_string, value))
        return head + struct.pack(f"<{len(value)}{_SCALARS[kind]}", *value)
    kind = _scalar_type(value)
    contents = _string(value) if kind == _V.STRING else struct.pack(f"<{_SCALARS[kind]}", value)
    return struct.pack("<I", kind) + contents


def _scalar_type(value: Any) -> GGUFValueType:
    if isinstance(value, str):
        return _V.STRING
    if isinstance(value, np.generic) and value.dtype.name in _NUMPY:
        return _NUMPY[value.dtype.name]
    if isinstance(value, bool):
        return _V.BOOL
    if isinstance(value, float):
        return _V.FLOAT32
    if not isinstance(value, int):
        raise TypeError(f"no GGUF type for {type(value).__name__}")
    if value >= 0:
        return _V.UINT32 if value < 1 << 32 else _V.UINT64
    return _V.INT32 if value >= -(1 << 31) else _V.INT64


def _element_type(values: Sequence[Any]) -> GGUFValueType:
    """The one type of an array's elements; an empty array is one of strings."""
    if not values:
        return _V.STRING
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        small = all(-(1 << 31) <= v < 1 << 31 for v in values)
        return _V.INT32 if small else _V.INT64
    kinds = {_scalar_type(v) for v in values}
    if len(kinds) > 1:
        raise TypeError(f"elements of several types: {', '.join(sorted(k.name for k in kinds))}")
    return kinds.pop()
