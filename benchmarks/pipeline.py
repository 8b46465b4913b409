# SPDX-License-Identifier: Apache-2.0
"""A trace of a model split in stages: when each stage computes, and how much of that time two of them do.

python benchmarks/pipeline.py MODEL --rules FILE [--prompt 400] [--replies 4] [--png OUT]

On a machine without accelerators, virtual devices stand for them; one thread computes on each:
XLA_FLAGS='--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false'.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from ktx_jax import LLM, SamplingParams


@dataclass
class Trace:
    """Wraps a model's stages; a thread a stage waits for each result and notes when it is there."""

    llm: LLM
    spans: list[list[tuple[float, float]]] = field(default_factory=list)  # by stage, in order: begun, ended

    def __enter__(self) -> "Trace":
        steps = self.llm._engine.steps
        self.stages, self.spans = steps.stages, [[] for _ in steps.stages]
        self.waiting = [ThreadPoolExecutor(1) for _ in self.stages]
        self.ready: dict[int, float] = {}
        steps.stages = [self._traced(index, stage) for index, stage in enumerate(self.stages)]
        return self

    def __exit__(self, *_: object) -> None:
        self.llm._engine.steps.stages = self.stages
        for pool in self.waiting:
            pool.shutdown()

    def _traced(self, index: int, stage: Any) -> Any:
        def call(x: Any, *arguments: Any, **keywords: Any) -> Any:
            asked, out = time.perf_counter(), stage(x, *arguments, **keywords)
            self.waiting[index].submit(self._note, index, asked, id(x), out)
            return out

        return call

    def _note(self, index: int, asked: float, came_from: int, out: Any) -> None:
        jax.block_until_ready(out)
        now = time.perf_counter()
        # It could begin when it was asked for, its input was there, and the stage's step before had ended.
        before = self.spans[index][-1][1] if self.spans[index] else 0.0
        begun = max(asked, before, self.ready.get(came_from, 0.0) if index else 0.0)
        self.ready[id(out)] = now
        self.spans[index].append((begun, now))


def together(spans: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """Seconds in which some stage computes, and in which at least two do."""
    edges = sorted((at, step) for stage in spans for span in stage for at, step in zip(span, (1, -1), strict=True))
    some = several = 0.0
    running, last = 0, edges[0][0]
    for at, step in edges:
        some += (at - last) if running else 0.0
        several += (at - last) if running > 1 else 0.0
        running, last = running + step, at
    return some, several


def draw(spans: list[list[tuple[float, float]]], out: Path) -> None:
    import matplotlib.pyplot as plt

    begin = min(start for stage in spans for start, _ in stage)
    figure, axes = plt.subplots(figsize=(10, 0.6 * len(spans) + 1.2), layout="constrained")
    for index, stage in enumerate(spans):
        bars = [(start - begin, end - start) for start, end in stage]
        axes.broken_barh(bars, (index - 0.4, 0.8), edgecolor="white", facecolor=f"C{index}")
    axes.set(yticks=range(len(spans)), yticklabels=[f"stage {i}" for i in range(len(spans))], xlabel="seconds")
    axes.invert_yaxis()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rules", required=True)
    parser.add_argument("--implementation", choices=("xla", "ffi"))
    parser.add_argument("--prompt", type=int, default=400, help="tokens of each prompt")
    parser.add_argument("--replies", type=int, default=4, help="how many run at once")
    parser.add_argument("--tokens", type=int, default=16, help="of each reply")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    llm = LLM(arguments.model, context=arguments.prompt + arguments.tokens + 1, batch=arguments.replies,
              implementation=arguments.implementation, rules=arguments.rules)  # fmt: skip
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0.0, ignore_eos=True)
    prompts = [[(7 * i + j) % 1000 for j in range(arguments.prompt)] for i in range(arguments.replies)]
    llm.generate(prompts, params)  # compiles
    for title, depth in (("one step at a time", 1), ("pipelined", len(llm._engine.steps.stages))):
        llm._engine.steps.depth = depth
        with Trace(llm) as trace:
            begun = time.perf_counter()
            llm.generate(prompts, params)
            took = time.perf_counter() - begun
        some, several = together(trace.spans)
        print(f"{title}: {took:.2f} s; two stages or more compute in {several / some:.0%} of the time")
    if arguments.png:
        draw(trace.spans, arguments.png)


if __name__ == "__main__":
    main()
