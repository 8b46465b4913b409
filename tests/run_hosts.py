# SPDX-License-Identifier: Apache-2.0
"""One process of a run, for test_hosts: python run_hosts.py MODEL RULES IMPLEMENTATION DEVICES [PORT INDEX].

Process 0 prints its answers as JSON, then obeys lines: "on" has it generate until it is ended, their end is its end.
"""

import json
import os
import sys

MODEL, RULES, IMPLEMENTATION, DEVICES, *PLACE = sys.argv[1:]
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} " + os.environ.get("X", "")

import ktx_jax  # noqa: E402

PROMPTS = [list(range(40, 52)), [7, 8]]
# Beginnings in common that end inside a page, so that pages are copied; more tokens than one step has room for.
PAIRS = [([*range(40, 60), i], list(range(i, i + 30))) for i in range(20)]


def answers(llm: ktx_jax.LLM, greedy: ktx_jax.SamplingParams) -> dict[str, list]:
    return {
        "replies": [reply.token_ids for reply in llm.generate(PROMPTS, greedy)],
        "scores": [score.logprobs.tolist() for score in llm.score(PAIRS)],
        "rolling": [score.logprobs.tolist() for score in llm.rolling([list(range(9, 200))])],
        "logits": llm.logits(PROMPTS[0]).tolist(),
    }


def main() -> None:
    if PLACE:
        port, index = PLACE
        # Machines that run tests may stand still for long.
        ktx_jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), heartbeat_seconds=600)
    llm = ktx_jax.LLM(
        MODEL, context=64, batch=2, dtype="float32", implementation=IMPLEMENTATION, rules=ktx_jax.Rules.from_file(RULES)
    )
    if PLACE and int(PLACE[1]) > 0:
        llm.follow()
        return
    greedy = ktx_jax.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
    print("answers", json.dumps(answers(llm, greedy)), flush=True)
    for line in sys.stdin:
        while line.strip() == "on":
            llm.generate(PROMPTS, greedy)
            print("more", flush=True)


if __name__ == "__main__":
    main()
