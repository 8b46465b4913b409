# SPDX-License-Identifier: Apache-2.0
"""Which files make up a model: found on disk by their names."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ktx_jax.gguf.errors import GGUFError

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST_LISTED = 8


class _PartName(NamedTuple):
    stem: str
    number: int
    count: int


def find_parts(path: Path) -> tuple[Path, ...]:
    """The files of the model at `path`, in order: a directory, a single file, or any part of a split set.

    Raises:
        GGUFError: nothing is there, several models are, or parts are missing.
    """
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}") from error
    if is_directory:
        path = _only_model_in(path)
    elif not is_file:
        raise GGUFError(_not_there(path))
    name = _parse_name(path)
    if name is None:
        return (path,)
    if not 1 <= name.number <= name.count:
        raise GGUFError(f"{path}: the name says part {name.number} of {name.count}, which cannot be")
    present = {file.name for file in _listdir(path.parent) if file.is_file()}
    wanted = [f"{name.stem}-{number:05d}-of-{name.count:05d}.gguf" for number in range(1, name.count + 1)]
    missing = [(number, file) for number, file in enumerate(wanted, 1) if file not in present]
    if missing:
        numbers = _listed([str(number) for number, _ in missing])
        words = f"part {numbers} of {name.count} is" if len(missing) == 1 else f"parts {numbers} of {name.count} are"
        raise GGUFError(
            f"{words} missing: {_listed([file for _, file in missing])} (looked in {path.parent}); "
            "put all parts of the model into that folder"
        )
    return tuple(path.parent / file for file in wanted)


def other_models_beside(files: Sequence[Path]) -> list[str]:
    """Names of the .gguf files in the same folder as `files` that are not among them."""
    return [file.name for file in _gguf_files(files[0].parent) if file not in files]


def _only_model_in(directory: Path) -> Path:
    """One file of the only model in `directory`."""
    models: dict[tuple[str, int] | str, Path] = {}
    for file in _gguf_files(directory):
        name = _parse_name(file)
        models.setdefault((name.stem, name.count) if name else file.name, file)
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        names = _listed([file.name for file in models.values()])
        raise GGUFError(f"{directory}: holds {len(models)} models, give the file of one: {names}")
    message = f"{directory}: no .gguf file in this folder"
    nested = sorted(child.name for child in _listdir(directory) if child.is_dir() and _gguf_files(child))
    if nested:
        raise GGUFError(f"{message}, but in these inside it, give one: {_listed(nested)}")
    if any(child.suffix in (".safetensors", ".bin") for child in _listdir(directory)):
        raise GGUFError(f"{message}, but other weights: get the model as GGUF, or convert it")
    raise GGUFError(f"{message}: give the folder or a file of a GGUF model")


def _not_there(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: a link to {path.readlink()}, which is not there: finish the download"
    if path.exists():
        return f"{path}: neither a file nor a folder"
    where = next(parent for parent in path.absolute().parents if parent.is_dir())
    found = [child.name for child in _gguf_files(where)]
    inside = f"it holds {_listed(found)}" if found else "it holds no .gguf file"
    return (
        f"{path}: no such file or folder (nothing is downloaded: give a GGUF on this machine); "
        f"{where} exists, and {inside}"
    )


def _parse_name(path: Path) -> _PartName | None:
    match = _PART_NAME.fullmatch(path.name)
    return _PartName(match["stem"], int(match["number"]), int(match["count"])) if match else None


def _gguf_files(directory: Path) -> list[Path]:
    """The visible .gguf files in `directory`, sorted; macOS leaves hidden `._NAME.gguf` beside real ones."""
    files = _listdir(directory)
    return [f for f in files if f.suffix == ".gguf" and not f.name.startswith(".") and f.is_file()]


def _listdir(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise GGUFError(f"{directory}: this folder cannot be listed: {error.strerror}") from error


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + rest
