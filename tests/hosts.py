# SPDX-License-Identifier: Apache-2.0
"""Processes of one run on this machine, for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 600  # for loading and compiling on a busy machine


class Process:
    """One of a run: `python COMMAND`, with what it writes in files: nobody has to read while it writes."""

    def __init__(self, folder: Path, name: str, *command: object):
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        with self._out.open("w") as out, self._err.open("w") as err:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, command)], stdin=subprocess.PIPE, stdout=out, stderr=err, env=env, text=True
            )

    def lines(self, word: str) -> list[str]:
        """What follows `word` on the whole lines that begin with it. Gloo writes others."""
        whole, _, _ = self._out.read_text().rpartition("\n")
        return [line[len(word) :] for line in whole.splitlines() if line.startswith(word)]

    def wait_for(self, word: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not (found := self.lines(word)):
            assert self.popen.poll() is None, self.errors()
            assert time.monotonic() < deadline, f"no {word!r}: {self.errors()}"
            time.sleep(0.1)
        return found[0]

    def say(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def end(self) -> int:
        """Closes its input, and waits until it has ended."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        return self.popen.wait(PATIENCE)

    def output(self) -> str:
        return self._out.read_text()

    def errors(self) -> str:
        return self._err.read_text()


@contextmanager
def processes() -> Iterator[list[Process]]:
    """A list of processes, for what is started inside: none of them is left at the end."""
    started: list[Process] = []
    yield started
    for process in started:
        process.popen.kill()
        process.popen.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
