# SPDX-License-Identifier: Apache-2.0
"""The first eight bytes of a file: whether it is GGUF at all, and of a version that can be read."""

from ktx_jax.gguf.cursor import Cursor
from ktx_jax.gguf.errors import GGUFError

VERSIONS = (2, 3)

_MAGIC = b"GGUF"

# What people give by mistake: a file's first bytes, and what to say of it.
_OTHER_FORMATS = {
    b"FUGG": "a byte-swapped (big-endian) GGUF file; get the little-endian one",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint; convert it to GGUF",
    b"lmgg": "a GGML file, the format before GGUF; convert the model again",
    b"tjgg": "a GGJT file, the format before GGUF; convert the model again",
    b"fmgg": "a GGMF file, the format before GGUF; convert the model again",
    b"version https://git-lfs": "a Git LFS pointer, not the model: run `git lfs pull`, or download the file",
    b"<!DOCTYPE": "a web page, not the model: download the file itself",
    b"<!doctype": "a web page, not the model: download the file itself",
    b"<html": "a web page, not the model: download the file itself",
}


def check_signature(cursor: Cursor) -> None:
    """Reads magic and version from the start of a file.

    Raises:
        GGUFError: naming the other format, or the version, that was found.
    """
    path = cursor.path
    cursor.take(len(_MAGIC), "the magic")
    if cursor.data[: len(_MAGIC)] != _MAGIC:
        raise GGUFError(f"{path}: this is not a GGUF file but {_describe(cursor.data[:64])}")
    version = cursor.u32("the GGUF version")
    if version in VERSIONS:
        return
    if version and version & 0xFFFF == 0:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise GGUFError(f"{path}: a byte-swapped (big-endian) GGUF file, version {swapped}; get the little-endian one")
    if version == 1:
        reason = "the first form of 2023, with 32-bit lengths; convert the model again"
    elif version == 0:
        reason = "which does not exist: the header is damaged; download the file again"
    else:
        reason = "newer than this program or damaged"
    raise GGUFError(f"{path}: GGUF version {version}, {reason} (versions 2 and 3 can be read)")


def _describe(start: bytes) -> str:
    for first_bytes, description in _OTHER_FORMATS.items():
        if start.startswith(first_bytes):
            return description
    if start[8:9] == b"{":
        return "probably a safetensors file; give a GGUF of the model, or convert it"
    return f"something that begins with {start[:8]!r}; a GGUF file begins with {_MAGIC!r}"
