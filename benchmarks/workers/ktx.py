# SPDX-License-Identifier: Apache-2.0
"""Measures ktx-jax: a whole model, decode over a long cache, one layer of experts, attention."""

import math
import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import ktx_ffi
import numpy as np

from ktx_jax import LLM, SamplingParams
from ktx_jax.gguf.reader import open_gguf


def _llm(job: dict[str, Any], context: int) -> LLM:
    return LLM(job["file"], context=context, batch=1, cpu_threads=job["threads"], repack=job["repack"])


def _reply_times(llm: LLM, prompt: list[int], tokens: int) -> list[float]:
    """Seconds from the call to each token of a greedy reply."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    return [time.perf_counter() - begin for _ in llm.stream(prompt, params)]


def _limits() -> dict[str, float]:
    """The machine's limits now: bytes read a second, int8 and bfloat16 products a second (0: no such unit).

    The best of three: a thread that wakes late makes a measurement this short too low.
    """
    taken = [ktx_ffi.measure_limits(256 << 20) for _ in range(3)]
    return {name: max(each[name] for each in taken) for name in taken[0]}


def model(job: dict[str, Any]) -> dict[str, Any]:
    """Load seconds, seconds of each prefill, tokens/s of each reply, peak memory.

    `limits`: the machine's between them. `prefill_int8`, `decode_read`: for each prefill and reply the mean of those
    just before and after it.
    """
    lengths = {int(length): times for length, times in job["prefill"].items()}
    llm = _llm(job, max(16, *lengths) + job["decode"] + 1)
    for length in (16, min(lengths)):  # compiles what is measured
        _reply_times(llm, common.prompt(length, seed=0), 2)
    peak_rss = common.peak_rss()
    limits, decode, decode_read = [_limits()], [], []
    prefill: dict[int, list[float]] = {length: [] for length in lengths}
    prefill_int8: dict[int, list[float]] = {length: [] for length in lengths}

    def around(name: str) -> float:
        limits.append(_limits())
        return (limits[-2][name] + limits[-1][name]) / 2

    for length, times in lengths.items():
        for seed in range(1, times + 1):
            prefill[length].append(_reply_times(llm, common.prompt(length, seed), 1)[0])
            prefill_int8[length].append(around("int8"))
    for seed in range(1, job["replies"] + 1):
        times = _reply_times(llm, common.prompt(16, seed), job["decode"] + 1)
        decode.append(job["decode"] / (times[-1] - times[0]))
        decode_read.append(around("read"))
    return {"load_s": llm.load_seconds, "prefill_s": prefill, "prefill_int8": prefill_int8, "decode_tok_s": decode,
            "decode_read": decode_read, "peak_rss": peak_rss, "limits": limits}  # fmt: skip


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load seconds alone."""
    return {"load_s": _llm(job, 64).load_seconds}


def depth(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds a token with no cache behind it and with `job["depth"]` positions, in turns."""
    llm = _llm(job, job["depth"] + job["decode"] + 2)
    engine = llm._engine
    scheduler = engine._scheduler
    params = SamplingParams(max_tokens=job["decode"] + 1, temperature=0.0, ignore_eos=True)

    def decode(length: int) -> float:
        request = engine.add(common.prompt(length, seed=1), params)
        # Let in by hand, all but the last token as computed: what lies in the cache does not change the time.
        scheduler.waiting.remove(request)
        request.pages = scheduler.borrow(math.ceil(length / scheduler.limits.page))
        request.computed = length - 1
        scheduler.running.append(request)
        while len(request.output) < 1:
            engine.step()
        took = common.timed(lambda: [engine.step() for _ in range(job["decode"])])
        return took / job["decode"]

    lengths = {"empty_s": 1, "deep_s": job["depth"]}
    for length in lengths.values():
        decode(length)
    result: dict[str, list[float]] = {name: [] for name in lengths}
    for _ in range(job["repeats"]):
        for name, length in lengths.items():
            result[name].append(decode(length))
    return {**result, "peak_rss": common.peak_rss()}


def experts(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each call of one layer's experts."""
    ktx_ffi.set_threads(job["threads"])
    weights = []
    with open_gguf(job["file"]) as gguf:
        for part in ("gate", "up", "down"):
            name = f"blk.{job['layer']}.ffn_{part}_exps.weight"
            weights.append(ktx_ffi.Weights(gguf.blocks(name), gguf.tensors[name].ggml_type))
            gguf.release(name)
    apply = jax.jit(ktx_ffi.experts)
    handles = [jnp.asarray(w.operand) for w in weights]
    seconds: dict[int, list[float]] = {}
    for tokens, calls in zip(job["tokens"], job["calls"], strict=True):
        inputs = [
            (jnp.asarray(x), jnp.asarray(ids, jnp.int32), jnp.asarray(share))
            for x, ids, share in common.expert_inputs(tokens, calls + 1, job["shape"])
        ]
        jax.block_until_ready(apply(*inputs[0], *handles))  # compiles what is measured
        seconds[tokens] = [common.timed(lambda at=at: jax.block_until_ready(apply(*at, *handles))) for at in inputs[1:]]
    return {"seconds": seconds, "peak_rss": common.peak_rss()}


def attention(job: dict[str, Any]) -> dict[str, Any]:
    """Attention alone over a long cache, a decode step and a prefill chunk: share of the bfloat16 peak."""
    ktx_ffi.set_threads(job["threads"])
    rank, rope, page, rng = 512, 64, 64, np.random.default_rng(0)
    pages = math.ceil(job["depth"] / page)
    cache = jax.lax.bitcast_convert_type(
        jnp.asarray(rng.standard_normal((pages, page, rank + rope), np.float32), jnp.bfloat16), jnp.uint16
    )
    table = jnp.arange(pages, dtype=jnp.int32)[None]
    apply = jax.jit(ktx_ffi.mla_attention, static_argnames="scale")
    shares: dict[str, list[float | None]] = {}
    for heads in job["heads"]:
        for tokens in job["tokens"]:
            positions = jnp.arange(job["depth"] - tokens, job["depth"], dtype=jnp.int32)
            q = jnp.asarray(rng.standard_normal((tokens, heads, rank + rope), np.float32), jnp.bfloat16)
            operands = (q[..., :rank], q[..., rank:], cache, table, jnp.zeros(tokens, jnp.int32), positions)
            macs = float(jnp.sum(positions.astype(jnp.float32) + 1)) * heads * (2 * rank + rope)
            jax.block_until_ready(apply(*operands, scale=0.1))
            shares[f"{heads}x{tokens}"] = []
            for _ in range(job["repeats"]):
                took = common.timed(lambda at=operands: jax.block_until_ready(apply(*at, scale=0.1)))
                peak = _limits()["bf16"]
                shares[f"{heads}x{tokens}"].append(macs / took / peak if peak else None)
    return {"of_bf16_peak": shares}


def _kl(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Divergence of `other` from `exact`, nats, both logits [T, V]: the mean over positions, and the median, which the
    few tokens that a router sends elsewhere do not move."""
    p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(a, jnp.float32), axis=-1), np.float64) for a in (exact, other))
    each = np.sum(np.exp(p) * (p - q), axis=-1)
    return {"mean": float(np.mean(each)), "median": float(np.median(each))}


def fidelity(job: dict[str, Any]) -> dict[str, Any]:
    """Divergence from a file's exact logits: ours, and llama.cpp's where its answer is kept beside them."""
    llm = LLM(
        job["file"], context=512, batch=1, dtype=job["dtype"], cpu_threads=job["threads"], override=job["override"]
    )
    with np.load(job["logits"]) as kept:
        exact = kept[job["key"]]
        peer = f"llamacpp_{job['key']}"
        theirs = _kl(exact, kept[peer]) if peer in kept.files else None
        return {"ours": _kl(exact, llm.logits(kept["tokens"].tolist())), "llama.cpp": theirs}


if __name__ == "__main__":
    common.main({f.__name__: f for f in (model, load, depth, experts, attention, fidelity)})
