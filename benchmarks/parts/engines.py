# SPDX-License-Identifier: Apache-2.0
"""Runs workers: one process for each measurement, so that only one model is in memory."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORKERS = Path(__file__).parent.parent / "workers"
_SECONDS = 1200


class WorkerError(Exception):
    """A worker ended without a result."""


@dataclass(frozen=True)
class Engine:
    """A way to run a job: whose code, by which interpreter, and whether weights are repacked."""

    name: str
    worker: str
    python: str
    repack: bool = True

    def run(self, kind: str, **job: Any) -> dict[str, Any]:
        """The worker's result.

        Raises:
          WorkerError: it failed; with the end of what it said.
        """
        begin = time.perf_counter()
        command = [
            self.python,
            str(_WORKERS / f"{self.worker}.py"),
            json.dumps({"kind": kind, "repack": self.repack, **job}),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise WorkerError(f"{self.name}: {kind} took more than {_SECONDS} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise WorkerError(f"{self.name}: {kind}: {said[-1]}")
        print(f"  {self.name}: {kind}, {time.perf_counter() - begin:.0f} s", flush=True)
        return json.loads(done.stdout)


KTX = Engine("ktx-jax", "ktx", sys.executable)
KTX_MAPPED = Engine("ktx-jax, not repacked", "ktx", sys.executable, repack=False)


def find_peers(python: str | None) -> tuple[list[Engine], Engine | None, dict[str, Any]]:
    """llama.cpp in its two modes, kt-kernel, and what builds they are; each only if `python` can import it."""
    if python is None:
        print("no --peers: ktx-jax alone is measured")
        return [], None, {}
    found, about = {}, {}
    for name, worker in {"llama.cpp": "llama", "kt-kernel": "kt"}.items():
        engine = Engine(name, worker, python)
        try:
            about[name] = engine.run("about")
            found[worker] = engine
        except (WorkerError, OSError) as error:
            print(f"{name} is absent: {error}")
    llama = [Engine(f"llama.cpp, {how}", "llama", python, repack)
             for how, repack in {"repacked": True, "not repacked": False}.items()]  # fmt: skip
    return (llama if "llama" in found else []), found.get("kt"), about
