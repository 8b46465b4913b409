# SPDX-License-Identifier: Apache-2.0
"""What every worker shares: it takes one job as JSON, and prints its result as the only line of its standard output."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

VOCABULARY = 100_000  # ids below this are ordinary tokens in every file made here


def prompt(length: int, seed: int) -> list[int]:
    """The same random tokens for every engine."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def expert_inputs(tokens: int, calls: int, shape: dict[str, int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each call: activations [T, D], distinct expert ids [T, k] and their weights, float32."""
    rng = np.random.default_rng(tokens)
    inputs = []
    for _ in range(calls):
        ids = rng.random((tokens, shape["experts"])).argsort(axis=1)[:, : shape["used"]]
        weights = rng.random((tokens, shape["used"]), np.float32)
        x = rng.standard_normal((tokens, shape["hidden"]), np.float32)
        inputs.append((x, ids.astype(np.int64), weights / weights.sum(axis=1, keepdims=True)))
    return inputs


def peak_rss() -> int:
    """The most memory this process has had, in bytes (the file's pages that it mapped and touched included)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def timed(f: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def main(kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Runs the job given as the first argument; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    print(json.dumps(kinds[job["kind"]](job)), file=out, flush=True)
