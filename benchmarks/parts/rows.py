# SPDX-License-Identifier: Apache-2.0
"""The table: each figure beside its peer's, their ratio, and the goal."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_KTX, _MAPPED, _KT = "ktx-jax", "ktx-jax, not repacked", "kt-kernel"

# Ratios to the better mode of llama.cpp: decode, prefill of 512 tokens.
_MODEL_GOALS = {"lite": (1.15, 2.8), "v2.5": (1.15, 2.0), "q8_0": (1.1, 2.0)}
_EXPERT_GOALS = {1: 3.0, 16: 1.7, 512: 2.8}
_GB = 1e9


@dataclass(frozen=True)
class Row:
    """`ratio` is what `goal` speaks of: at least it, or at most it where `at_most`."""

    work: str
    unit: str
    ours: float
    peers: dict[str, float]
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _share(rates: Iterable[float], limits: Iterable[float]) -> float | None:
    """The median of rates, each over the machine's limit around it; None where it has no such unit."""
    return _median([rate / limit for rate, limit in zip(rates, limits, strict=True) if limit])


def _against(work: str, figures: dict[str, float], goal: float | None) -> Row:
    """Ours against the best of the others, in tokens/s."""
    peers = {name: value for name, value in figures.items() if name != _KTX}
    ratio = figures[_KTX] / max(peers.values()) if peers else None
    return Row(work, "tokens/s", figures[_KTX], peers, ratio, goal)


def _of_share(work: str, share: float | None, goal: float | None = None) -> Iterator[Row]:
    if share:
        yield Row(work, "share", share, {}, share, goal)


def rows(results: dict[str, Any]) -> list[Row]:
    """What `results` holds, in the order of the goals."""
    found: list[Row] = []
    for key, record in results["models"].items():
        found += _model(key, record)
    found += [*_depth(results), *_attention(results), *_experts(results), *_fidelity(results)]
    return found


def _model(key: str, record: dict[str, Any]) -> Iterator[Row]:
    title, engines = record["title"], record["engines"]
    if not engines.get(_KTX):
        return
    decode_goal, prefill_goal = _MODEL_GOALS[key]
    speeds = {
        name: statistics.median(s for run in runs for s in run["decode_tok_s"])
        for name, runs in engines.items()
        if runs and name != _MAPPED
    }
    yield _against(f"{title}: decode", speeds, decode_goal)
    ours = engines[_KTX]
    bandwidth = _share(
        [speed * record["decode_bytes"] for run in ours for speed in run["decode_tok_s"]],
        [limit for run in ours for limit in run["decode_read"]],
    )
    yield from _of_share(f"{title}: decode, of the read bandwidth", bandwidth, 0.9 if key == "lite" else None)
    per_token = {}
    for length in ("512", "2048"):
        times = {
            name: _median([s for run in runs for s in run.get("prefill_s", {}).get(length, [])])
            for name, runs in engines.items()
        }
        rates = {name: int(length) / value for name, value in times.items() if value}
        if _KTX not in rates:
            continue
        per_token[length] = 1 / rates[_KTX]
        yield _against(f"{title}: prefill of {length}", rates, prefill_goal if length == "512" else None)
        int8 = _share(
            [int(length) * record["prefill_macs"] / s for run in ours for s in run["prefill_s"].get(length, [])],
            [limit for run in ours for limit in run["prefill_int8"].get(length, [])],
        )
        yield from _of_share(f"{title}: prefill of {length}, of the int8 peak", int8)
    if len(per_token) == 2:
        ratio = per_token["2048"] / per_token["512"]
        yield Row(f"{title}: time a token in 2048, to that in 512", "ratio", ratio, {}, ratio, 1.0, at_most=True)
    yield from _load(key, title, record)


def _load(key: str, title: str, record: dict[str, Any]) -> Iterator[Row]:
    engines = record["engines"]
    times = {name: statistics.median(run["load_s"] for run in runs) for name, runs in engines.items() if runs}
    goals = {_KTX: 8.0, _MAPPED: 2.0} if key == "lite" else {}
    for name, how in {_KTX: "", _MAPPED: ", without repacking"}.items():
        if name in times:
            peers = {peer: value for peer, value in times.items() if peer not in (_KTX, _MAPPED)} if not how else {}
            yield Row(f"{title}: load{how}", "s", times[name], peers, times[name], goals.get(name), at_most=True)
    peaks = {
        name: max(run["peak_rss"] for run in runs) / _GB for name, runs in engines.items() if runs and name != _MAPPED
    }
    over = peaks[_KTX] - record["file_bytes"] / _GB
    others = {name: value for name, value in peaks.items() if name != _KTX}
    yield Row(f"{title}: peak memory (ratio: GB beyond the file)", "GB", peaks[_KTX], others, over, 1.5, at_most=True)


def _depth(results: dict[str, Any]) -> Iterator[Row]:
    for run in results.get("depth", {}).get("runs", []):
        ratio = statistics.median(run["deep_s"]) / statistics.median(run["empty_s"])
        work = f"V2-Lite: decode at {results['depth']['positions']} cached tokens, time to that at 0"
        yield Row(work, "ratio", ratio, {}, ratio, 2.2, at_most=True)


def _attention(results: dict[str, Any]) -> Iterator[Row]:
    for run in results.get("attention", {}).get("runs", []):
        for name, shares in run["of_bf16_peak"].items():
            heads, tokens = name.split("x")
            positions = results["attention"]["positions"]
            work = f"attention, {heads} heads, {tokens} tokens at {positions}, of the bfloat16 peak"
            yield from _of_share(work, _median([share for share in shares if share]), 0.5)


def _experts(results: dict[str, Any]) -> Iterator[Row]:
    engines = results.get("experts", {}).get("engines", {})
    if not engines.get(_KTX):
        return
    for tokens in results["experts"]["tokens"]:
        rates = {
            name: tokens / statistics.median(s for run in runs for s in run["seconds"][str(tokens)])
            for name, runs in engines.items()
            if runs
        }
        yield _against(f"one V2.5 expert layer, {tokens} tokens", rates, _EXPERT_GOALS.get(tokens))


def _fidelity(results: dict[str, Any]) -> Iterator[Row]:
    """Where llama.cpp routes otherwise (grouped experts), its divergence on the ungrouped file of the type counts."""
    found = {name: runs[0] for name, runs in results.get("fidelity", {}).items() if runs}
    plain = {name: found.get(f"mini/{name.split('/')[1]}") for name in found}
    kept = {name: run["llama.cpp"]["mean"] for name, run in plain.items() if run}
    ours = {name: found[name]["ours"]["mean"] for name in kept}
    if not ours:
        return
    for name, value in ours.items():
        ratio = value / kept[name]
        work = f"{name}: divergence from the exact logits"
        yield Row(work, "nats", value, {"llama.cpp": kept[name]}, ratio, 1.5, at_most=True)
    mean, theirs = statistics.fmean(ours.values()), statistics.fmean(kept.values())
    yield Row("mean divergence over these files", "nats", mean, {"llama.cpp": theirs}, mean / theirs, 1.0, at_most=True)


def _number(value: float) -> str:
    return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def print_table(table: list[Row]) -> None:
    """As Markdown."""
    print("| work | ktx-jax | peers | ratio | goal | |")
    print("|---|---|---|---|---|---|")
    for row in table:
        unit = "" if row.unit in ("ratio", "share") else f" {row.unit}"
        peers = " · ".join(f"{_number(value)} ({name})" for name, value in row.peers.items())
        ratio = "" if row.ratio is None or row.ratio == row.ours else _number(row.ratio)
        goal = "" if row.goal is None else f"{'≤' if row.at_most else '≥'} {row.goal:g}"
        met = {True: "met", False: "**missed**", None: ""}[row.met]
        print(f"| {row.work} | {_number(row.ours)}{unit} | {peers} | {ratio} | {goal} | {met} |")
