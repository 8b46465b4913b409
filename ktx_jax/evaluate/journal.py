# SPDX-License-Identifier: Apache-2.0
"""Results in a file of JSON lines, appended as they come: a run that is killed goes on from what is there."""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ktx_jax.errors import KtxError


class Journal:
    """Results by key. The first line of the file says what run they are of; each other line holds one result.

    A line counts once it is whole, with its line feed: what a kill cut off is dropped. The file is locked while open.

    Args:
      path: the file; None keeps nothing beyond this process.
      run: what the results depend on (model, text, options), as JSON values.
      resume: take the results that are there; without it, there must be none (a first line alone is written anew).

    Raises:
      KtxError: the file is of another run, holds something else, is open elsewhere, cannot be written, or has results
        that are not to be resumed.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any], *, resume: bool = False):
        self._results: dict[str, Any] = {}
        self._file: int | None = None
        if path is None:
            if resume:
                raise KtxError("there is nothing to resume without a file of results (--out)")
            return
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise KtxError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):  # a pipe or a device keeps nothing
                raise KtxError(f"{path} is not a file that keeps results: choose another --out")
            self._lock()
            self._read(json.loads(json.dumps(run)), resume)
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def add(self, key: str, result: Any) -> None:
        """Keeps a result: it survives the death of this process from here on."""
        assert key not in self._results, key
        self._append([key, result])
        self._results[key] = result

    def close(self) -> None:
        """Closes the file; results can still be read."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, value: Any) -> None:
        if self._file is None:
            return
        line = memoryview(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise KtxError(
                f"{self._path}: a result cannot be written: {error.strerror} (those before it are kept: --resume)"
            ) from error

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KtxError(f"{self._path}: another process is writing its results there") from None

    def _read(self, run: Any, resume: bool) -> None:
        assert self._file is not None
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not data.startswith(b'{"run"'[: len(data)]):
            raise KtxError(f"{self._path} does not hold results of ktx-jax: choose another --out")
        if not resume:
            if len(lines) > 1:
                raise KtxError(f"{self._path} holds results: --resume goes on with them, or choose another --out")
            lines, whole = [], b""
        entries = [self._parsed(line, number) for number, line in enumerate(lines, 1)]
        if entries:
            self._check_run(entries[0], run)
        for number, entry in enumerate(entries[1:], 2):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise KtxError(f"{self._path}, line {number}: not a result")
            self._results[entry[0]] = entry[1]
        os.ftruncate(self._file, len(whole))
        if not entries:
            self._append({"run": run})

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise KtxError(f"{self._path}, line {number}: not a result of ktx-jax: {error}") from error

    def _check_run(self, entry: Any, run: Any) -> None:
        if not (isinstance(entry, dict) and isinstance(entry.get("run"), dict)):
            raise KtxError(f"{self._path} does not hold results of ktx-jax: choose another --out")
        if (difference := _first_difference("", entry["run"], run)) is not None:
            raise KtxError(f"{self._path} holds results of another run: {difference} (choose another --out)")


def _first_difference(name: str, before: Any, now: Any) -> str | None:
    """The first value in which two runs differ, in words."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before, 1)), dict(enumerate(now, 1))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            place = f"{name} {key}".lstrip()
            if (difference := _first_difference(place, before.get(key), now.get(key))) is not None:
                return difference
        return None
    return None if before == now else f"{name} was {_shown(before)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    """A value in few words: what only one of the runs has is not told in full."""
    return "given" if isinstance(value, dict | list) else "not given" if value is None else json.dumps(value)
