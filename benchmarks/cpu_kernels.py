# SPDX-License-Identifier: Apache-2.0
"""CPU kernels against what the machine can do: share of its memory bandwidth in decode, of its int8 or bfloat16 peak in
prefill.

    python benchmarks/cpu_kernels.py [matmul] [experts] [attention] [--threads 2] [--json out.json]

Limits are measured between the repetitions, because shared machines change state within seconds; best and median are of
all repetitions, shares are of the best limit seen meanwhile.
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import ktx_ffi
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

TYPES = (T.Q4_K, T.Q6_K, T.Q5_0, T.Q8_0)
ROWS = (1, 4, 16, 64, 512)


def random_weights(ggml_type: T, *shape: int) -> ktx_ffi.Weights:
    block, size = GGML_QUANT_SIZES[ggml_type]
    row = np.random.default_rng(0).integers(0, 32, (1, 1, shape[-1] // block, size), dtype=np.uint8)
    rows = np.ascontiguousarray(np.broadcast_to(row, (1, *shape[-2:-1], *row.shape[2:])))
    if len(shape) == 2:
        return ktx_ffi.Weights(rows[0], ggml_type)
    return ktx_ffi.Weights(np.broadcast_to(rows, (shape[0], *rows.shape[1:])), ggml_type)


def run(call, *operands) -> None:
    call(*operands).block_until_ready()


class Record:
    """Times of one case and the limits seen between them."""

    def __init__(self, name: str, macs: float, read: float, peak: str):
        self.name, self.macs, self.read, self.peak = name, macs, read, peak
        self.times: list[float] = []
        self.limits: list[dict[str, float]] = []

    def run(self, call, seconds: float) -> "Record":
        call()
        end = time.perf_counter() + seconds
        while len(self.times) < 3 or time.perf_counter() < end:
            self.limits.append(ktx_ffi.measure_limits(512 << 20))
            for _ in range(3):
                start = time.perf_counter()
                call()
                self.times.append(time.perf_counter() - start)
        return self

    def summary(self) -> dict:
        best, median = min(self.times), float(np.median(self.times))
        limit = {key: max(each[key] for each in self.limits) for key in self.limits[0]}
        return {
            "case": self.name,
            "best_ms": best * 1e3,
            "median_ms": median * 1e3,
            "GMAC/s": self.macs / best / 1e9,
            "of_peak": self.macs / best / limit[self.peak] if limit[self.peak] else None,
            "GB/s": self.read / best / 1e9,
            "of_bandwidth": self.read / best / limit["read"],
            "repetitions": len(self.times),
        }


def matmul_cases(seconds: float):
    n, k = 49152, 5120
    for ggml_type in TYPES:
        w = random_weights(ggml_type, n, k)
        call = jax.jit(lambda x, handle: ktx_ffi.matmul(x, handle, n))
        for rows in ROWS:
            x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, k)), jnp.float32)
            record = Record(f"{ggml_type.name} {n}x{k}, {rows} rows", rows * n * k, w.nbytes, "int8")
            yield record.run(partial(run, call, x, w.operand), seconds)
        w.close()


def expert_cases(seconds: float):
    """One layer of V2.5: 160 experts of 1536, width 5120, Q4_K and a Q6_K `down`; 3.9 GB."""
    e, f, d, k = 160, 1536, 5120, 6
    ws = [random_weights(T.Q4_K, e, f, d), random_weights(T.Q4_K, e, f, d), random_weights(T.Q6_K, e, d, f)]
    one = sum(w.nbytes for w in ws) / e
    call = jax.jit(ktx_ffi.experts)
    rng = np.random.default_rng(2)
    for tokens in (1, 4, 16, 64, 512):
        x = jnp.asarray(rng.standard_normal((tokens, d)), jnp.float32)
        ids = np.stack([rng.permutation(e)[:k] for _ in range(tokens)]).astype(np.int32)
        weights = jnp.full((tokens, k), 1 / k, jnp.float32)
        operands = (x, jnp.asarray(ids), weights, *(w.operand for w in ws))
        used = len(np.unique(ids))
        record = Record(f"V2.5 experts, {tokens} tokens", 3 * tokens * k * f * d, used * one, "int8")
        yield record.run(partial(run, call, *operands), seconds)
    for w in ws:
        w.close()


def attention_cases(seconds: float):
    """V2-Lite's 16 heads over a bfloat16 cache."""
    h, r, p, page = 16, 512, 64, 64
    rng = np.random.default_rng(3)
    for tokens, length in ((1, 512), (1, 16384), (8, 4096), (512, 512)):
        pages = length // page
        cache = jnp.asarray(rng.standard_normal((pages, page, r + p)), jnp.bfloat16)
        cache = jax.lax.bitcast_convert_type(cache, jnp.uint16)
        positions = np.arange(length - tokens, length).astype(np.int32)
        q = jnp.asarray(rng.standard_normal((tokens, h, r + p)), jnp.float32)
        tables = jnp.arange(pages, dtype=jnp.int32)[None]
        indices = (tables, jnp.zeros(tokens, jnp.int32), jnp.asarray(positions))
        operands = (q[..., :r], q[..., r:], cache, *indices)
        call = jax.jit(lambda *operands: ktx_ffi.mla_attention(*operands, 0.1))
        macs = float(np.sum(positions + 1.0)) * h * (2 * r + p)
        record = Record(f"attention, {tokens} tokens at {length}", macs, length * (r + p) * 2, "bf16")
        yield record.run(partial(run, call, *operands), seconds)


CASES = {"matmul": matmul_cases, "experts": expert_cases, "attention": attention_cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[], help=f"any of {', '.join(CASES)} (default: matmul attention)")
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least this long a case (default %(default)s)")
    parser.add_argument("--json", help="write the results here too")
    args = parser.parse_args()
    if unknown := set(args.what) - set(CASES):
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    if args.threads:
        ktx_ffi.set_threads(args.threads)
    print(f"{ktx_ffi.isa()}, {ktx_ffi.threads()} threads")
    results = []
    for what in args.what or ("matmul", "attention"):
        for record in CASES[what](args.seconds):
            row = record.summary()
            results.append(row)
            share = "" if row["of_peak"] is None else f" ({row['of_peak']:.2f} of peak)"
            times = f"{row['best_ms']:9.2f} ms (median {row['median_ms']:.2f})"
            memory = f"{row['GB/s']:6.1f} GB/s ({row['of_bandwidth']:.2f} of bandwidth)"
            print(f"{row['case']:34} {times}  {row['GMAC/s']:7.1f} GMAC/s{share}  {memory}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"isa": ktx_ffi.isa(), "threads": ktx_ffi.threads(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
