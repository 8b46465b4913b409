# SPDX-License-Identifier: Apache-2.0
"""The engine under many requests at once: what a batch gains, and how long a newcomer waits.

    python benchmarks/serving.py MODEL [--batch 8] [--chunk 128] [--json out.json]
    python benchmarks/serving.py MODEL --soak MINUTES [--streams 64]

Prompts are random tokens, each its own, so that the prefix cache helps only where a second turn is measured. Every
program is compiled before anything is timed.

With --soak, a server in a process of its own and so many clients at once, which ask, leave and hang up at random: every
complete reply has to be that of the same request alone, and at the end every page free; the server's memory is printed.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktx_jax import LLM, AsyncEngine, SamplingParams, load_config


@dataclass
class Timed:
    """When a reply's pieces came, in seconds after it was asked for."""

    times: list[float]
    tokens: list[int]
    cached: int

    @property
    def first(self) -> float:
        return self.times[0]


class Bench:
    def __init__(self, llm: LLM, args: argparse.Namespace):
        self.llm, self.args = llm, args
        self.engine = AsyncEngine(llm, chunk=args.chunk)
        self._rng = np.random.default_rng(0)

    def prompt(self, length: int) -> list[int]:
        return self._rng.integers(4, self.llm.config.vocab_size, length).tolist()

    async def ask(self, prompt: list[int], count: int) -> Timed:
        begun = time.perf_counter()
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        reply = Timed([], [], 0)
        async with self.engine.generate(prompt, params) as stream:
            async for chunk in stream:
                reply.times.append(time.perf_counter() - begun)
                reply.tokens += chunk.token_ids
            reply.cached = stream.cached_tokens
        return reply

    async def rate(self, count: int) -> float:
        """Tokens a second of `count` replies that run together, from where all of them have begun."""
        replies = await asyncio.gather(*[self.ask(self.prompt(16), self.args.reply) for _ in range(count)])
        begun, ended = max(reply.first for reply in replies), min(reply.times[-1] for reply in replies)
        came = sum(sum(begun < at <= ended for at in reply.times) for reply in replies)
        return came / (ended - begun)

    async def beside(self, whole: float, part: float) -> float:
        """Time to first token of a short prompt that comes when a long one has been read for `part` of its time."""
        long = asyncio.create_task(self.ask(self.prompt(self.args.long), 1))
        await asyncio.sleep(whole * part)
        assert not long.done()
        short = await self.ask(self.prompt(self.args.short), 1)
        assert not long.done()
        await long
        return short.first

    async def turns(self) -> tuple[Timed, Timed, int]:
        """The first and the second turn of a chat, and how many tokens are new in the second."""
        prompt = self.prompt(self.args.chat)
        first = await self.ask(prompt, 32)
        new = self.prompt(40)
        second = await self.ask([*prompt, *first.tokens, *new], 4)
        return first, second, len(first.tokens) + len(new) + self.args.chat - second.cached

    async def measure(self) -> dict[str, Any]:
        args = self.args
        begun = time.perf_counter()
        programs = self.engine.warm_up()
        print(f"{programs} programs compiled, or found compiled, in {time.perf_counter() - begun:.1f} s", flush=True)
        found: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            found.setdefault(name, []).append(value)
            print(f"  {name}: {value:.4g}", flush=True)

        for turn in range(args.rounds):
            print(f"round {turn + 1}")
            one, many = await self.rate(1), await self.rate(args.batch)
            note("tokens a second, 1 sequence", one)
            note(f"tokens a second, {args.batch} sequences", many)
            note("batch gain", many / one)
            idle = (await self.ask(self.prompt(args.short), 1)).first
            whole = (await self.ask(self.prompt(args.long), 1)).first
            note("short prompt, idle, s", idle)
            note("long prompt, idle, s", whole)
            for part in (0.15, 0.4, 0.65):
                beside = await self.beside(whole, part)
                note("short prompt beside a long one, s", beside)
                note("beside / idle", beside / idle)
            first, second, computed = await self.turns()
            note("first turn, s", first.first)
            note("second turn, s", second.first)
            note("second / first", second.first / first.first)
            note("tokens computed in the second turn", computed)
        return {name: {"median": statistics.median(values), "all": values} for name, values in found.items()}


async def run(args: argparse.Namespace) -> dict[str, Any]:
    context = max(args.long, args.chat + 128) + 128
    llm = LLM(args.model, context=context, batch=args.batch, implementation=args.implementation)
    bench = Bench(llm, args)
    try:
        measured = await bench.measure()
        stats = bench.engine.stats()
    finally:
        await bench.engine.close(0)
    settings = {name: getattr(args, name) for name in ("batch", "chunk", "short", "long", "chat", "reply", "rounds")}
    about = {"model": os.path.basename(args.model), "implementation": llm.implementation, "load": os.getloadavg()[0]}
    return {
        **about,
        **settings,
        "preemptions": stats.preemptions,
        "results": measured,
    }


def soak(args: argparse.Namespace) -> bool:
    """Runs a server and its clients; whether all held."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import soak
    from serving import REAL, serving

    options = ["--name", "it", "--context", str(args.context), "--batch", str(args.batch)]
    if args.implementation:
        options += ["--implementation", args.implementation]
    with serving(REAL, args.model, *options) as server:
        soak.until(lambda: server.ask("/ready")[0] == 200, server.log, 3600)
        print(server.log[-2].strip(), flush=True)
        vocabulary = load_config(args.model).vocab_size
        bodies = soak.requests("it", args.requests, vocabulary, args.context)
        report = soak.soak(server, bodies, args.streams, 60 * args.soak, every=10)
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(report.fates.items()))
    print(f"{args.streams} streams for {args.soak:g} minutes: {fates}")
    print(f"{len(report.wrong)} wrong, {report.lost} pages lost")
    print("memory, MB:", " ".join(f"{value / 1e6:.0f}" for value in report.memory))
    print(f"grown in the second half: {report.grown / 1e6:.1f} MB")
    for wrong in report.wrong[:5]:
        print(wrong)
    return not report.wrong and not report.lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--implementation")
    for name, default, meaning in [
        ("batch", 8, "sequences that run at once"),
        ("chunk", 128, "the most prompt tokens in a step"),
        ("short", 64, "tokens of the prompt that comes while a long one is read"),
        ("long", 2048, "tokens of the long prompt"),
        ("chat", 1500, "tokens of the first turn of a chat"),
        ("reply", 64, "tokens of each reply whose speed is measured"),
        ("rounds", 3, "times that everything is measured"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="many clients that come and go, for so long")
    parser.add_argument("--streams", type=int, default=64, help="with --soak: clients at once (64)")
    parser.add_argument("--requests", type=int, default=48, help="with --soak: different requests (48)")
    parser.add_argument("--context", type=int, default=512, help="with --soak: most tokens of a request (512)")
    args = parser.parse_args()
    if args.soak:
        sys.exit(not soak(args))
    result = asyncio.run(run(args))
    print(f"\n{result['model']}, {result['implementation']}, load {result['load']:.1f}")
    for name, values in result["results"].items():
        print(f"{name:44} {values['median']:10.4g}   ({min(values['all']):.4g} to {max(values['all']):.4g})")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
