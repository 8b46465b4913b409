# SPDX-License-Identifier: Apache-2.0
"""Compiling ahead: on virtual CPU devices always, for GPUs that are not here where the extra `aot` is installed."""

import dataclasses
import re
from importlib import metadata

import pytest
from plan_golden import ROOT, preset

from ktx_jax.aot import compile as ahead
from ktx_jax.aot.compile import Compilation, check_installed, compile_plan, run_job
from ktx_jax.aot.exchanges import exchanges
from ktx_jax.aot.hlo import MOSAIC
from ktx_jax.aot.representatives import Representatives
from ktx_jax.aot.target_config import target_config, topology
from ktx_jax.errors import KtxError
from ktx_jax.presets import Shape, preset_config
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.step_size import step_size
from ktx_jax.sharding.targets import load_target, target_names

V25 = ROOT / "configs" / "deepseek-v2.5"
# The proportions of V2.5 and V2-Lite, cut eight ways inside super-blocks.
SIZES = {"kv_lora": 64, "nope": 32, "rope": 16, "value": 32}
SMALL = Shape("small", 4, 256, 1024, 768, 8, 128, 16, 8, 3, 16.0, 0.1, **SIZES)
LITE = Shape("lite", 3, 256, 1088, 384, 8, None, 16, 1, 1, 1.0, 0.0707, **SIZES)
# Everything cut that a rule can cut, queries and values along other axes than keys.
ODD = r"""
mesh: {data: 2, expert: 2, tensor: 2}
rules:
  - {match: '.*norm', shard: [expert]}
  - {match: '.*\.mlp\.gate', shard: [tensor]}
  - {match: '.*\.q_a_proj', shard: [expert, tensor]}
  - {match: '.*\.(q_b_proj|kv_a_proj_with_mqa)', shard: [[expert, tensor]]}
  - {match: '.*\.k_b_proj', shard: [tensor], replicate: expert}
  - {match: '.*\.v_b_proj', shard: [expert], replicate: tensor}
  - {match: '.*\.o_proj', shard: [expert, tensor]}
  - {match: '.*\.experts\.(gate|up)_proj', shard: [expert, tensor]}
  - {match: '.*\.experts\.down_proj', shard: [expert, null, tensor]}
  - {match: '.*\.shared_experts\.gate_proj', shard: [tensor]}
  - {match: '.*\.shared_experts\.up_proj', shard: [null, tensor]}
  - {match: '.*\.shared_experts\.down_proj', shard: [expert, tensor]}
  - {match: '.*\.mlp\.(gate|up)_proj', shard: [tensor]}
  - {match: '.*\.mlp\.down_proj', shard: [expert, null]}
  - {match: 'model\.embed_tokens', shard: [tensor, expert]}
  - {match: 'lm_head', shard: [expert, tensor]}
"""
LITE_ODD = ODD.replace("  - {match: '.*\\.q_a_proj', shard: [expert, tensor]}\n", "").replace("q_b_proj", "q_proj")
STAGES = r"""
mesh: {tensor: 4}
stages: [gpu:0-3, gpu:4-7]
rules:
  - {match: 'model\.embed_tokens|model\.layers\.[01]\..*', stage: 0}
  - {match: '.*', stage: 1}
  - {match: '.*norm|.*\.(q_a_proj|kv_a_proj_with_mqa|mlp\.gate)', shard: replicate}
  - {match: '.*\.(k_b_proj|v_b_proj|experts\..*)', shard: [tensor]}
  - {match: '.*\.(o_proj|down_proj)', shard: [null, tensor]}
  - {match: '.*', shard: [tensor]}
"""


def small_plan(shape, rules, **sizes):
    sizes = {"context": 128, "batch": 4, "dtype": "float32", "platform": "cpu"} | sizes
    return Plan.from_rules(preset_config(shape), rules, **sizes)


def check(plan: Plan, made: Compilation) -> None:
    """Nothing is exchanged, and nothing held, that the plan did not predict."""
    assert [(s.phase, s.stage) for s in made.steps] == [
        (z.phase, i) for z in made.sizes for i in range(len(plan.stages))
    ]
    for step in made.steps:
        assert step.error is None
        need = plan.needs[plan.stages[step.stage].devices[0]]
        assert step.arguments == pytest.approx(need.weights + need.cache, rel=0.02)
        found = exchanges(plan, step_size(plan, step.phase), step)
        assert [e for e in found if e.predicted != e.compiled or e.surprising] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8gpu", "8gpu-width", "8gpu-expert-tensor", "8gpu-data"])
def test_decode_exchanges_and_holds_what_the_plan_says(name):
    plan = small_plan(SMALL, Rules.from_file(V25 / f"{name}.yaml"))
    check(plan, compile_plan(plan, load_target("cpu"), phases=("decode",)))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "text"), [(LITE, LITE_ODD), (SMALL, ODD), (SMALL, STAGES)])
def test_so_do_odd_cuts_stages_and_prefill(shape, text):
    plan = small_plan(shape, Rules.from_text(text))
    check(plan, compile_plan(plan, load_target("cpu")))


@pytest.mark.slow
def test_representatives_stand_for_all_layers():
    plan = small_plan(SMALL, Rules.from_file(V25 / "8gpu.yaml"))
    few, all_of_them = (
        compile_plan(plan, load_target("cpu"), phases=("decode",), whole=whole) for whole in (False, True)
    )
    assert (few.layers, all_of_them.layers) == (3, 4)
    [one], [whole] = few.steps, all_of_them.steps
    assert one.arguments == whole.arguments
    assert one.temporaries == pytest.approx(whole.temporaries, rel=0.1)
    size = step_size(plan, "decode")
    counts = [[(e.kind, e.nbytes, e.compiled) for e in exchanges(plan, size, step)] for step in (one, whole)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["8gpu", "8gpu-2stages", "3gpu"])
def test_what_layers_stand_for(name):
    plan = Plan.from_rules(preset("v2.5"), Rules.from_file(V25 / f"{name}.yaml"))
    chosen = Representatives.of(plan)
    assert sum(chosen.stands_for.values()) == 60
    # Dense, and experts' down in Q6_K or Q4_K, in each stage.
    assert len(chosen.stands_for) == 1 + 2 * len(plan.stages)
    assert [layer for stage in chosen.plan.stages for layer in stage.layers] == sorted(chosen.stands_for)
    paths = {p.path for p in chosen.plan.parameters}
    assert {"model.embed_tokens", "lm_head", "model.layers.0.mlp.gate_proj"} <= paths


@pytest.mark.parametrize("name", [name for name in target_names() if name != "cpu"])
def test_a_target_as_the_compiler_wants_it(name):
    target = load_target(name)
    text = target_config(target)
    assert text.count("{") == text.count("}")
    assert f"device_memory_size: {target.memory}" in text
    assert ("ACCELERATED_FEATURES" in text) == (name in ("h100", "h200"))


def test_hosts_of_devices():
    h200 = load_target("h200")
    assert [topology(h200, n) for n in (1, 8, 9, 16, 64)] == ["1x1x1", "1x1x8", "1x2x8", "1x2x8", "1x8x8"]


class TestRefusals:
    def plan(self, name="8gpu", **sizes):
        return Plan.from_rules(preset("v2.5"), Rules.from_file(V25 / f"{name}.yaml"), **sizes)

    def test_a_plan_for_another_platform(self):
        with pytest.raises(KtxError, match="the plan is for a gpu, but 32-core server CPU is a cpu"):
            compile_plan(self.plan(), load_target("cpu"))

    def test_parts_on_the_host(self):
        with pytest.raises(KtxError, match="parts on the host"):
            compile_plan(self.plan("cpu-experts"), load_target("h200"))

    def test_a_target_without_a_compiler(self):
        with pytest.raises(KtxError, match="no `cuda`"):
            target_config(dataclasses.replace(load_target("h200"), cuda=None))

    def test_no_compiler_installed(self, monkeypatch):
        def version(package):
            if package == "jax":
                return "1.2.3"
            raise metadata.PackageNotFoundError(package)

        monkeypatch.setattr(ahead.metadata, "version", version)
        with pytest.raises(
            KtxError, match=r"jax-cuda12-plugin is not installed: pip install .*jax-cuda12-plugin==1\.2\.3"
        ):
            check_installed()

    def test_a_compiler_of_another_version(self, monkeypatch):
        monkeypatch.setattr(ahead.metadata, "version", lambda package: "1.2.3" if package == "jax" else "1.2.2")
        with pytest.raises(KtxError, match=r"1\.2\.2 does not go with jax 1\.2\.3"):
            check_installed()

    def test_a_compiling_process_that_dies_says_why(self):
        plan = small_plan(SMALL, Rules.from_file(V25 / "8gpu.yaml"))
        job = ahead.Job(plan, (step_size(plan, "decode"),), "xla", 1, None, None, 1)
        with pytest.raises(KtxError, match=r"(?s)the compiling process ended with code 1.*rules name 8 devices"):
            run_job(job)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_compiler")
class TestAbsentGpus:
    @pytest.mark.parametrize(("name", "target"), [("8gpu", "h200"), ("64gpu", "h100"), ("4gpu", "a100-80g")])
    def test_the_whole_of_v25(self, name, target):
        plan = Plan.from_rules(preset("v2.5"), Rules.from_file(V25 / f"{name}.yaml"))
        made = compile_plan(plan, load_target(target))
        check(plan, made)
        assert made.peak_memory < 4e9

    def test_two_hosts_and_one_kind_without_nvlink(self):
        rules = (V25 / "8gpu.yaml").read_text().replace("tensor: 8", "tensor: 16")
        plan = Plan.from_rules(preset("v2.5"), Rules.from_text(rules))
        check(plan, compile_plan(plan, load_target("rtx4090"), phases=("decode",)))

    @pytest.mark.parametrize(
        ("model", "quant", "layer", "of_ours"),
        [("v2.5", "iq4_xs", 22, 17), ("v2-lite", "q4_k_m", 21, 15)],
        ids=["V2.5", "V2-Lite"],
    )
    def test_whole_steps_on_the_gpu_kernels(self, model, quant, layer, of_ours, tmp_path, monkeypatch):
        """On one H200: every product a kernel, no weight dequantized, no expert made dense, one CUDA graph a token."""
        monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
        target = load_target("h200")
        plan = Plan.for_target(preset(model), Rules.from_text("rules: []", "one device"), target, types=quant, batch=1)
        made = compile_plan(plan, target)
        check(plan, made)
        decode, prefill = made.steps
        # Smaller than any one weight of the step would be in bfloat16, and than a layer's experts.
        assert decode.temporaries < 16e6
        assert prefill.temporaries < 0.3e9
        layers = plan.config.num_hidden_layers
        ours = 2 + of_ours * layers - 3  # norm and head; a dense layer has three fewer
        # Prompts may attend in expanded form: keys, values, and the attention itself.
        assert [step.launches(MOSAIC) for step in made.steps] == [ours, ours + 3 * layers]
        # The first layers have also what a step does once.
        last = max(int(match[1]) for k in decode.kernels if (match := re.search(r"layers\.(\d+)/", k.where)))
        assert sum(f"layers.{last}/" in k.where for k in decode.kernels) == layer
        graphs = [
            {line.split()[1] for line in path.read_text().splitlines() if line[:1].isdigit()}
            for path in tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
        ]
        assert {"kCommandBuffer"} in graphs  # decode, the draw included
