# SPDX-License-Identifier: Apache-2.0
"""A GGUF model: one file or a split set, its headers validated, its tensors read in place through `mmap`."""

import difflib
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from jaxtyping import UInt8

from ktx_jax.gguf.errors import GGUFError, quote
from ktx_jax.gguf.header import Header, parse_header
from ktx_jax.gguf.parts import find_parts, other_models_beside
from ktx_jax.gguf.split import check_split
from ktx_jax.gguf.tensor_info import TensorInfo

__all__ = ["GGUF", "GGUFError", "TensorInfo", "open_gguf"]


def open_gguf(path: str | os.PathLike[str]) -> "GGUF":
    """Opens the model at `path`: a directory, a single file, or any part of a split set.

    Reads and validates headers only; tensors stay on disk until their blocks are touched. The architecture is
    not looked at: see `architecture.check_architecture`.

    Raises:
        GGUFError: the model is not there, not whole, or not well-formed.
    """
    path = Path(path)
    files = find_parts(path)
    maps = {file: _map(file) for file in files}
    headers = [parse_header(file, data) for file, data in maps.items()]
    check_split(headers)
    return GGUF(path, headers, maps)


class GGUF:
    """An open GGUF model. `open_gguf` makes it; close it, or use it as a context manager.

    The files must not be shortened while it is open: the system ends a program that touches mapped bytes that
    are gone.

    Attributes:
        path: what was opened.
        files: the parts, in order.
        metadata: that of the first part, as Python scalars, str, and lists of them.
        tensors: those of all parts by name, in file order.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: Path, headers: Iterable[Header], maps: Mapping[Path, mmap.mmap]):
        headers = tuple(headers)
        self.path = path
        self.files = tuple(maps)
        self.metadata = MappingProxyType(dict(headers[0].metadata))
        self.tensors = MappingProxyType({info.name: info for header in headers for info in header.tensors})
        self._maps = dict(maps)

    def blocks(self, name: str) -> UInt8[np.ndarray, "*lead nb ts"]:
        """The raw blocks of a tensor, a read-only view of the mapped file: nothing is read until touched.

        The view stays valid after `close`; the file stays mapped until the last view is gone.

        Raises:
            GGUFError: there is no such tensor.
        """
        info = self._info(name)
        block_size, type_size = GGML_QUANT_SIZES[info.ggml_type]
        raw = np.frombuffer(self._map_of(info), np.uint8, info.nbytes, info.offset)
        return raw.reshape(*info.shape[:-1], info.shape[-1] // block_size, type_size)

    def release(self, name: str) -> None:
        """Gives up this process's hold on a tensor's pages, once its blocks have been copied elsewhere.

        Resident memory falls by the tensor's size, but for the pages it shares with its neighbours. Reading
        it again is still correct, from the system's page cache or from disk. Without `madvise` nothing happens.

        Raises:
            GGUFError: there is no such tensor.
        """
        info = self._info(name)
        data = self._map_of(info)
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and start < end:
            data.madvise(mmap.MADV_DONTNEED, start, end - start)

    def missing_tensor_error(self, name: str) -> GGUFError:
        """The error for a tensor that the model needs and the files lack: what was read, likely causes."""
        if len(self.files) == 1:
            read = f"{self.files[0]}, which holds {len(self.tensors)} tensors and is no part of a split set"
        else:
            read = (
                f"all {len(self.files)} parts, {self.files[0].name} to {self.files[-1].name} in "
                f"{self.files[0].parent}, which hold {len(self.tensors)} tensors"
            )
        lines = [f"{self.path}: tensor {quote(name)} is missing. Read: {read}; none is cut short."]
        if near := difflib.get_close_matches(name, self.tensors, n=3, cutoff=0.8):
            lines.append(f"Similar names there: {', '.join(map(quote, near))}.")
        lines.append(self._likely_cause())
        if others := other_models_beside(self.files):
            lines.append(f"Not read, in the same folder: {', '.join(others[:8])}.")
        return GGUFError(" ".join(lines))

    def _likely_cause(self) -> str:
        if not self.tensors:
            return "The file holds a vocabulary or metadata only: give the file with the model's weights."
        content = self.metadata.get("general.type", "model")
        lora = any(name.endswith((".lora_a", ".lora_b")) for name in self.tensors)
        if content == "adapter" or lora:
            return "The file is a LoRA adapter: give the base model."
        if content != "model":
            return f"The file is of the type {quote(str(content))}, not a language model."
        return (
            "It may be another model, a LoRA adapter, the wrong folder, or one piece of a model cut by other "
            "means than a GGUF split."
        )

    def close(self) -> None:
        """Lets go of the files; views made before stay valid. Closing twice is allowed."""
        self._maps.clear()

    def __enter__(self) -> "GGUF":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise self.missing_tensor_error(name)
        return self.tensors[name]

    def _map_of(self, info: TensorInfo) -> mmap.mmap:
        if info.file not in self._maps:
            raise ValueError(f"{self.path} is closed")
        return self._maps[info.file]


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size == 0:
                raise GGUFError(f"{file}: the file is empty (0 bytes); download it again")
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GGUFError(f"{file}: cannot be read: {error.strerror}") from error
