# SPDX-License-Identifier: Apache-2.0
"""Whether files that by name are one split set are so by their headers.

Each part says in `split.no` which part it is, counted from 0. The first says in `split.count` how many there
are, and in `split.tensors.count` how many tensors all hold together; others may repeat both.
"""

from collections.abc import Sequence
from pathlib import Path

from ktx_jax.gguf.errors import GGUFError, quote
from ktx_jax.gguf.header import Header


def check_split(headers: Sequence[Header]) -> None:
    """Checks that the files, in the order of their names, are one whole set by their own account.

    Raises:
        GGUFError: a file is not the part its name says, is there twice, belongs to another set, or the
            tensors are not as many as the set has.
    """
    for index, header in enumerate(headers):
        if len(headers) == 1:
            _check_single(header)
        else:
            _check_part(header, index, len(headers))
    _check_tensors(headers)


def _check_single(header: Header) -> None:
    count = _whole_number(header, "split.count") or 1
    if count > 1:
        number = (_whole_number(header, "split.no") or 0) + 1
        raise GGUFError(
            f"{header.path}: this is part {number} of {count} of a split model, but its name does not end in "
            f"-{number:05d}-of-{count:05d}.gguf: give the parts their names back"
        )


def _check_part(header: Header, index: int, total: int) -> None:
    number = _whole_number(header, "split.no")
    count = _whole_number(header, "split.count")
    for key, value in (("split.no", number), ("split.count", count if index == 0 else total)):
        if value is None:
            raise GGUFError(f"{header.path}: the name says part {index + 1} of {total}, but {key} is not set")
    if count is not None and count != total:
        raise GGUFError(f"{header.path}: the name says one of {total} parts, but split.count is {count}")
    if number is not None and number != index:
        raise GGUFError(
            f"{header.path}: the name says part {index + 1}, but by its split.no it is part {number + 1} "
            f"of {total}: a copy or a renamed file; get part {index + 1} again"
        )


def _check_tensors(headers: Sequence[Header]) -> None:
    first = headers[0]
    claimed = _whole_number(first, "split.tensors.count")
    found: dict[str, Path] = {}
    for header in headers:
        own = _whole_number(header, "split.tensors.count")
        if own is not None and own != claimed:
            raise GGUFError(
                f"{header.path}: split.tensors.count is {own}, but {claimed} in {first.path.name}: "
                "the files are parts of different models"
            )
        for tensor in header.tensors:
            if tensor.name in found:
                raise GGUFError(
                    f"{header.path}: tensor {quote(tensor.name)} is in {found[tensor.name].name} too: "
                    "a part is there twice, or the files are parts of different models"
                )
            found[tensor.name] = header.path
    if claimed is None and len(headers) > 1:
        raise GGUFError(f"{first.path}: split.tensors.count is not set in the first of {len(headers)} parts")
    if claimed is not None and claimed != len(found):
        parts = "file holds" if len(headers) == 1 else f"{len(headers)} parts hold"
        raise GGUFError(
            f"{first.path}: the {parts} {len(found)} tensors, but split.tensors.count is {claimed}: "
            "a part is of another split of the model; get all parts again from one place"
        )


def _whole_number(header: Header, key: str) -> int | None:
    value = header.metadata.get(key)
    if value is None or (type(value) is int and value >= 0):
        return value
    raise GGUFError(f"{header.path}: {key} is {quote(str(value))}; it must be a whole number")
