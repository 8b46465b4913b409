# SPDX-License-Identifier: Apache-2.0
"""Runs small models by every file of `configs` on nine virtual devices; prints what came of each as a line of JSON.

In a process of its own, since the number of devices is settled when JAX starts: python run_plans.py FOLDER.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=9"

import jax
import numpy as np
from golden_models import mean_kl
from plan_golden import CONFIGS
from plan_models import BETWEEN, INSIDE, cut_layers, small_model

from ktx_jax import LLM, Rules, SamplingParams

PROMPTS = [list(range(40, 75)), [7], list(range(300, 311)), [5, 6, 5]]
LONG = [*range(1000, 1070), *range(2000, 2030)]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def load(path: Path, implementation: str, rules: Rules | None = None) -> LLM:
    return LLM(path, context=128, batch=4, dtype="float32", implementation=implementation, rules=rules)


def answers(llm: LLM) -> list[list[int]]:
    return [list(reply.token_ids) for reply in llm.generate(PROMPTS, GREEDY)]


def bytes_by_device(llm: LLM) -> dict[str, list[int]]:
    """Planned bytes of parameters that are arrays, and those that live on each device."""
    live: Counter[jax.Device] = Counter()
    for stage in llm._model.stages:
        for leaf in jax.tree.leaves(stage.decode.state):
            for shard in leaf.addressable_shards:
                live[shard.device] += shard.data.nbytes
    names = [name for name in llm.plan.devices if name != "cpu"]
    return {name: [llm.plan.needs[name].weights, live[jax.devices()[int(name[4:])]]] for name in names}


def main(folder: Path) -> None:
    alone: dict[Path, tuple[np.ndarray, list[list[int]]]] = {}
    for config in CONFIGS:
        text, layers = cut_layers(config.read_text(encoding="utf-8"))
        for implementation, shapes in (("xla", INSIDE), ("ffi", BETWEEN)):
            path = small_model(shapes[config.parent.name], layers, folder)
            if path not in alone:
                one = load(path, implementation)
                alone[path] = one.logits(LONG), answers(one)
            logits, replies = alone[path]
            for op in ("ffi", "pallas"):  # what a rule asks for in so many words
                text = text.replace(f"decode: {op}", f"decode: {implementation}")
            llm = load(path, implementation, Rules.from_text(text, config.name))
            found = {
                "config": f"{config.parent.name}/{config.stem}",
                "implementation": implementation,
                "kl": mean_kl(logits, llm.logits(LONG)),
                "same": answers(llm) == replies,
                "bytes": bytes_by_device(llm),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
