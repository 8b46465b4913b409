# SPDX-License-Identifier: Apache-2.0
"""Runs small models by every file of `configs` on nine virtual devices; prints what came of each as a line of JSON.

In a process of its own, since the number of devices is settled when JAX starts: python run_plans.py FOLDER.
"""

import json
import os
import sys
from collections import Counter
from functools import cache
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=9"

import jax
import numpy as np
from golden_models import mean_kl
from plan_golden import ONE_HOST
from plan_models import SHAPES, cut_layers, small_model

from ktx_jax import LLM, Rules, SamplingParams

PROMPTS = [list(range(40, 60)), [7, 300, 5]]
LONG = [*range(1000, 1040), *range(2000, 2020)]
# Scored on meshes and beside experts on the host: beginnings in common that end inside a page, which is copied.
SCORED = ("8gpu-data", "cpu-experts")
PAIRS = [([*range(40, 60), i], list(range(i, i + 30))) for i in range(60, 72)]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def load(path: Path, implementation: str, rules: Rules | None = None) -> LLM:
    return LLM(path, context=128, batch=2, dtype="float32", implementation=implementation, rules=rules)


def answers(llm: LLM) -> list[list[int]]:
    return [list(reply.token_ids) for reply in llm.generate(PROMPTS, GREEDY)]


def scores(llm: LLM) -> tuple[np.ndarray, int]:
    """Log-probabilities of all the pairs' tokens, and how often pages were copied."""
    copies, copy_pages = [], llm._engine.steps.copy_pages
    llm._engine.steps.copy_pages = lambda *pages: copies.append(pages) or copy_pages(*pages)
    return np.concatenate([score.logprobs for score in llm.score(PAIRS)]), len(copies)


def bytes_by_device(llm: LLM) -> dict[str, list[int]]:
    """Planned bytes of parameters that are arrays, and those that live on each device."""
    live: Counter[jax.Device] = Counter()
    for stage in llm._model.stages:
        for leaf in jax.tree.leaves(stage.decode.state):
            for shard in leaf.addressable_shards:
                live[shard.device] += shard.data.nbytes
    names = [name for name in llm.plan.devices if name != "cpu"]
    return {name: [llm.plan.needs[name].weights, live[jax.devices()[int(name[4:])]]] for name in names}


def in_terms_of(text: str, implementation: str) -> str:
    """Rules that name an implementation, for the one that is tested."""
    if implementation == "xla":
        return text.replace("decode: ffi", "decode: xla").replace("KExpertsCPU", "KExpertsTorch")
    return text


@cache
def alone(path: Path, implementation: str) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """What the model answers on one device, and how likely it finds the pairs."""
    llm = load(path, implementation)
    return llm.logits(LONG), answers(llm), scores(llm)[0]


def main(folder: Path) -> None:
    for config in ONE_HOST:
        text, layers = cut_layers(config.read_text(encoding="utf-8"))
        path = small_model(SHAPES[config.parent.name], layers, folder)
        for implementation in ("xla", "ffi"):
            logits, replies, likely = alone(path, implementation)
            llm = load(path, implementation, Rules.from_text(in_terms_of(text, implementation), config.name))
            found = {
                "config": f"{config.parent.name}/{config.stem}",
                "implementation": implementation,
                "sums_over_devices": any(stage.mesh.size > 1 for stage in llm._model.stages),
                "kl": mean_kl(logits, llm.logits(LONG)),
                "same": answers(llm) == replies,
                "bytes": bytes_by_device(llm),
            }
            if config.stem in SCORED:
                scored, copies = scores(llm)
                found |= {"scores_apart": float(np.abs(scored - likely).max()), "copies": copies}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
