# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels on a GPU: right, and how near to what the device can do. One command, under ten minutes.

    python benchmarks/gpu.py [--only WORD ...] [--json benchmarks/results/NAME.json]

First what the device can do: bytes copied a second and bfloat16 products a second, by XLA. Then each kernel against
the float32 reference, most at small sizes, and its runs against each other; then its time at the sizes of the models.
Operands are larger than the L2 cache and rotated: a program calls a kernel once on each of several sets of them, and
its time is divided by their number; medians of programs' times. Weights are random and made on the device. Then
which form of attention pays for prompts, by count and by the clock (`gpu_prompts.py`). Last, whole models from token
to token (`gpu_model.py`), those that the device has room for. Without a GPU it says so and exits with 1.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ktx_jax.cuda_plugin import leave_out_cuda

leave_out_cuda()
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")  # V2.5 takes 131 of an H200's 141 GB

import gpu_prompts as prompts  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from gpu_cases import checks, timings  # noqa: E402
from gpu_model import RUNS, run_models  # noqa: E402

L2_BYTES = 50 << 20
ROTATED_BYTES = 8 * L2_BYTES
MOST_SETS = 24
REPEATS = 15


def median_seconds(call: Callable, sets: list[tuple]) -> float:
    """Of one call among calls on each of the sets, in one program."""
    once = jax.jit(call)
    program = jax.jit(lambda sets: [once(*operands) for operands in sets])
    jax.block_until_ready(program(sets))
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(program(sets))
        times.append(time.perf_counter() - begun)
    return float(np.median(times)) / len(sets)


@dataclass(frozen=True)
class Limits:
    """What the device does for XLA: bytes/s read and written by a copy, bfloat16 operations/s (two a product)."""

    bandwidth: float
    operations: float


def measure_limits() -> Limits:
    size = 1 << 30
    arrays = [(jnp.full(size // 2, i, jnp.bfloat16),) for i in range(2)]
    copy = median_seconds(lambda x: -x, arrays)
    n = 8192
    keys = jax.random.split(jax.random.key(0), 4)
    matrices = [jax.random.normal(k, (n, n), jnp.bfloat16) for k in keys]
    matmul = median_seconds(lambda a, b: a @ b, [(matrices[0], matrices[1]), (matrices[2], matrices[3])])
    return Limits(2 * size / copy, 2 * n**3 / matmul)


def run_checks(words: list[str]) -> list[dict[str, Any]]:
    results = []
    for check in checks():
        if all(word in check.name for word in words):
            error = check.error()
            right = bool(error <= check.tolerance)
            results.append({"name": check.name, "error": error, "tolerance": check.tolerance, "right": right})
            print(
                f"{'right' if right else 'WRONG':6} {check.name:52} error {error:.1e} of {check.tolerance:.0e}",
                flush=True,
            )
    return results


def run_timings(words: list[str], limits: Limits) -> list[dict[str, Any]]:
    print(f"\n{'kernel':58} {'us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'of roofline':>11}")
    results = []
    for timing in timings():
        if not all(word in timing.name for word in words):
            continue
        operands = timing.make(jax.random.key(2))
        size = sum(a.nbytes for a in operands)
        count = int(max(2, min(MOST_SETS, -(-ROTATED_BYTES // size))))
        sets = [operands] + [timing.make(jax.random.key(3 + i)) for i in range(count - 1)]
        seconds = median_seconds(timing.kernel, sets)
        roofline = max(timing.read / limits.bandwidth, timing.operations / limits.operations)
        result = {
            "name": timing.name,
            "microseconds": seconds * 1e6,
            "gigabytes_a_second": timing.read / seconds / 1e9,
            "teraflops": timing.operations / seconds / 1e12,
            "of_roofline": roofline / seconds,
        }
        results.append(result)
        print(
            f"{timing.name:58} {result['microseconds']:9.1f} {result['gigabytes_a_second']:7.0f} "
            f"{result['teraflops']:8.1f} {result['of_roofline']:11.0%}",
            flush=True,
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names contain each of these words")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"No GPU: JAX sees {device.device_kind} ({device.platform}). Nothing was run.", file=sys.stderr)
        return 1
    if not str(getattr(device, "compute_capability", "")).startswith("9."):
        print(f"The kernels are for Hopper (compute capability 9.0); this is {device.device_kind}.", file=sys.stderr)
        return 1
    begun = time.perf_counter()
    limits = measure_limits()
    print(f"{device.device_kind}, jax {jax.__version__}: copies {limits.bandwidth / 1e9:.0f} GB/s (read and written), ")
    print(f"bfloat16 products {limits.operations / 1e12:.0f} TFLOP/s\n")
    right = run_checks(options.only)
    timed = run_timings(options.only, limits)
    forms = prompts.run_crossover(options.only, median_seconds)
    print()
    models = run_models(tuple(r for r in RUNS if all(word in r.name for word in options.only)), device)
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
    if options.json:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "device": device.device_kind,
            "jax": jax.__version__,
            "limits": asdict(limits),
            "checks": right,
            "timings": timed,
            "crossover": forms,
            "models": models,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r["right"] for r in right) else 1


if __name__ == "__main__":
    sys.exit(main())
