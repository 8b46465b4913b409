# SPDX-License-Identifier: Apache-2.0
"""Runs the tiny model, cut over four virtual devices, on the references of the GPU kernels; prints a line of JSON each.

In a process of its own, since the number of devices is settled when JAX starts.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from golden_models import relative_error
from pallas_models import LONG, loaded, logits, plan_of, references, write_tiny

from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.config import config_from_gguf
from ktx_jax.sharding.rules import Rules

COMMON = r"""
  - {match: '.*norm|.*\.(kv_a_proj_with_mqa|mlp\.gate)|model\.embed_tokens', shard: replicate}
  - {match: '.*\.mlp\.experts\.(gate|up)_proj', shard: [EXPERT, tensor]}
  - {match: '.*\.mlp\.experts\.down_proj', shard: [EXPERT, null, tensor]}
  - {match: '.*\.q_proj|.*\.[kv]_b_proj', shard: [tensor], replicate: expert}
  - {match: '.*\.o_proj|.*\.down_proj', shard: [null, tensor], replicate: expert}
  - {match: '.*', shard: [tensor], replicate: expert}
"""
CASES = {
    "experts and width": "mesh: {expert: 2, tensor: 2}\nrules:" + COMMON.replace("EXPERT", "expert"),
    "width alone": "mesh: {tensor: 2}\nrules:" + COMMON.replace("EXPERT", "null").replace(", replicate: expert", ""),
}
"""Down's rows are cut inside super-blocks in both."""
CASES["k_b and v_b apart"] = (
    CASES["width alone"]
    .replace("[kv]_b_proj", "k_b_proj")
    .replace("rules:", "rules:\n  - {match: '.*v_b_proj', shard: replicate}")
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, open_gguf(write_tiny(Path(folder, "tiny.gguf"))) as gguf:
        config = config_from_gguf(gguf.metadata, gguf.tensors, file="tiny")
        on_xla = plan_of(gguf, config).on_xla()
        exact, near = (logits(gguf, config, on_xla, dtype, LONG) for dtype in (jnp.float32, jnp.bfloat16))
        for case, text in CASES.items():
            plan = plan_of(gguf, config, Rules.from_text(text, case))
            with references():
                got = logits(gguf, config, plan, prompt=LONG)
            [stage] = loaded(gguf, plan).stages
            live = sum(
                shard.data.nbytes for leaf in jax.tree.leaves(stage.decode.state) for shard in leaf.addressable_shards
                if shard.device == jax.devices()[0]
            )  # fmt: skip
            line = {
                "case": case,
                "error": relative_error(exact, got),
                "error of xla": relative_error(exact, near),
                "on kernels": sum(p.ops.decode == "pallas" for p in plan.parameters),
                "planned": plan.needs["gpu:0"].weights,
                "live": live,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
