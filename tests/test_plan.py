# SPDX-License-Identifier: Apache-2.0
"""Plans: what wins, what is covered, bytes that add up, and what would fit."""

import math
import re

import pytest
from flax import nnx
from gguf import GGML_QUANT_SIZES
from golden_models import BY_NAME, golden_config, golden_path
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_golden import CONFIGS, config_plan, preset

from ktx_jax.errors import KtxError
from ktx_jax.gguf.blocks import NATIVE_TYPES
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.cache import new_cache
from ktx_jax.model.modules import DeepseekV2ForCausalLM
from ktx_jax.presets import preset_config
from ktx_jax.sharding.auto import Sizes, choose_rules
from ktx_jax.sharding.folding import fold_numbers, numbers_regex
from ktx_jax.sharding.granules import GRANULES, stored_bytes
from ktx_jax.sharding.memory import cache_bytes
from ktx_jax.sharding.parameters import file_types, inventory, parameter_shapes
from ktx_jax.sharding.partition import cuts
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.problems import Findings
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.split import split_evenly

GB = 10**9


def module_shapes(config):
    """Every parameter's module path and shape, as the modules have them."""
    model = nnx.eval_shape(lambda: DeepseekV2ForCausalLM(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, key[:-1])): tuple(leaf.get_value().shape) for key, leaf in flat}


@pytest.mark.parametrize(
    "config", [preset_config("v2.5", 3), preset_config("v2-lite", 2), *map(golden_config, BY_NAME)]
)
def test_shapes_are_those_of_the_modules(config):
    assert dict(sorted(parameter_shapes(config).items())) == dict(sorted(module_shapes(config).items()))


def test_every_native_type_has_a_granule():
    assert set(GRANULES) == NATIVE_TYPES
    for kind, granule in GRANULES.items():
        assert GGML_QUANT_SIZES[kind][0] % granule == 0


@pytest.mark.parametrize("name", BY_NAME)
def test_types_and_bytes_are_those_of_the_file(name):
    config = golden_config(name)
    with open_gguf(golden_path(BY_NAME[name])) as gguf:
        types = file_types(gguf, config)
        matrices = [t for t in gguf.tensors.values() if len(t.shape) > 1 and "ffn_gate_inp" not in t.name]
    plan = Plan.from_rules(config, Rules.from_text("rules: []"), types=types, context=64, batch=1)
    stored = [p for p in plan.parameters if len(p.shape) > 1 and not p.path.endswith("mlp.gate")]
    assert sum(p.nbytes for p in stored) == sum(t.nbytes for t in matrices if not t.name.endswith("kv_b.weight")) + sum(
        p.nbytes for p in stored if p.path.endswith(("k_b_proj", "v_b_proj")) and not config.k_b_transposed
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_plan_covers_every_parameter_once_and_its_bytes_add_up(path):
    plan = config_plan(path)
    model = inventory(plan.config, "q4_k_m")
    assert [p.path for p in plan.parameters] == list(model.by_path)
    assert sorted(layer for stage in plan.stages for layer in stage.layers) == list(
        range(plan.config.num_hidden_layers)
    )
    for p in plan.parameters:
        parts = cuts(p.spec, plan.mesh)
        whole, block = stored_bytes(p.shape, p.stored_type), GGML_QUANT_SIZES[p.stored_type][0]
        pieces = p.nbytes * math.prod(parts)
        if p.ops.decode == "pallas":  # the records of the GPU kernels
            assert whole <= pieces <= 1.03 * whole
            continue
        assert pieces == whole if p.shape[-1] // parts[-1] % block == 0 else pieces > whole
    held = {name: sum(p.nbytes for p in plan.parameters if name in p.devices) for name in plan.devices}
    assert held == {name: need.weights for name, need in plan.needs.items()}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_first_rule_that_sets_a_concern_wins(data):
    config = preset_config("v2-lite", 4)
    rules = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["q_proj", "o_proj", r"experts\..*", "up_proj", "norm"]),
                st.sampled_from([None, "xla", "pallas"]),
                st.booleans(),
            ).filter(lambda rule: rule[1] or rule[2]),
            max_size=4,
        )
    )
    rows = [
        f"  - {{match: '.*{kind}'{f', op: {op}' if op else ''}{', shard: replicate' if shard else ''}}}"
        for kind, op, shard in rules
    ]
    last = ["  - {match: '.*norm|.*mlp\\.gate', shard: replicate}", "  - {match: '.*', shard: [tensor], op: xla}"]
    parsed = Rules.from_text("\n".join(["mesh: {tensor: 2}", "rules:", *rows, *last]))
    findings = Findings()
    choices = parsed.choices(inventory(config, "q4_k_m"), findings)
    assert all("has no effect" in problem.message for problem in findings.problems())
    for path in parameter_shapes(config):
        mine = [rule for rule in rules if re.fullmatch(f".*{rule[0]}", path)]
        assert choices.by_path[path].ops.decode == next((op for _, op, _ in mine if op), "xla")
        repeated = any(shard for _, _, shard in mine) or re.fullmatch(r".*norm|.*mlp\.gate", path)
        shard = choices.by_path[path].shard
        assert shard is not None
        assert (shard.spec is None) == bool(repeated)


@given(st.sets(st.integers(0, 130), min_size=1))
@settings(deadline=None)
def test_a_regex_of_numbers_matches_just_those(numbers):
    pattern = re.compile(numbers_regex(numbers))
    assert {n for n in range(1400) if pattern.fullmatch(str(n))} == numbers
    assert fold_numbers(numbers).count(",") < len(numbers)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.lists(st.integers(0, 200), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_split_keeps_order_and_fits(costs, capacities):
    counts = split_evenly(costs, capacities)
    greedy_fits = True
    at = 0
    for capacity in capacities:
        room = capacity
        while at < len(costs) and costs[at] <= room:
            room -= costs[at]
            at += 1
    greedy_fits = at == len(costs)
    assert (counts is not None) == greedy_fits
    if counts is not None:
        assert sum(counts) == len(costs)
        begin = 0
        for count, capacity in zip(counts, capacities, strict=True):
            assert sum(costs[begin : begin + count]) <= capacity
            begin += count


@pytest.mark.parametrize(("dtype", "batch", "data"), [("bfloat16", 8, 1), ("float32", 3, 1), ("bfloat16", 3, 2)])
def test_the_cache_is_as_large_as_the_array(dtype, batch, data):
    config = preset_config("v2-lite", 3)
    pages = -(-batch // data) * 3  # a context of 130 takes three pages of 64
    arrays = new_cache(config, 3, pages, 64, dtype)
    assert cache_bytes(config, 3, 130, batch, dtype, data) == sum(a.nbytes for a in arrays)


def test_specs_are_partition_specs():
    from jax.sharding import PartitionSpec as P

    plan = Plan.from_rules(
        preset("v2-lite"),
        Rules.from_file(next(p for p in CONFIGS if p.match("*v2-lite/8gpu-expert-tensor.yaml"))),
    )
    specs = {p.path: p.partition_spec() for p in plan.parameters}
    assert specs["lm_head"] == P(("expert", "tensor"), None)
    assert specs["model.layers.1.mlp.experts.down_proj"] == P("expert", None, "tensor")
    assert specs["model.norm"] == P(None)


class TestFit:
    def test_what_fits(self):
        plan = Plan.from_rules(preset("v2-lite"), Rules.from_text("rules: []"))
        assert plan.check(24 * GB).ok
        assert plan.check([24 * GB]).ok
        assert plan.check({"gpu:0": 24 * GB}).ok
        assert str(plan.check(24 * GB)) == "the plan fits"

    def test_what_does_not_says_by_how_much_and_what_would(self):
        plan = Plan.from_rules(preset("v2.5"), Rules.from_text("rules: []"), context=32768)
        fit = plan.check(141 * GB)
        [short] = fit.shortfalls
        assert short.device == "gpu:0"
        assert short.over == plan.needs["gpu:0"].total - 141 * GB
        assert any("experts of layers" in change for change in fit.changes)
        assert any("layers over 2 devices" in change for change in fit.changes)
        assert "too little" in str(fit)

    def test_the_context_and_batch_it_names_fit_and_no_larger_ones_do(self):
        plan = Plan.from_rules(preset("v2.5"), Rules.from_text("rules: []"), context=32768)
        room = plan.resized(context=10048).needs["gpu:0"].total
        changes = " ".join(plan.check(room).changes)
        assert "a context of 10048 in place of 32768" in changes
        batch = int(re.search(r"a batch of (\d+)", changes)[1])
        assert plan.resized(batch=batch).check(room).ok
        assert not plan.resized(batch=batch + 1).check(room).ok

    def test_the_experts_it_names_are_enough(self):
        plan = Plan.from_rules(preset("v2.5"), Rules.from_text("rules: []"))
        [change] = [c for c in plan.check(80 * GB).changes if "experts" in c]
        first, last = map(int, re.search(r"layers (\d+)-(\d+)", change).groups())
        for begin, fits in ((first, True), (first + 1, False)):
            layers = numbers_regex(range(begin, last + 1))
            rules = rf"rules: [{{match: 'model\.layers\.({layers})\.mlp\.experts\..*', device: cpu}}]"
            assert Plan.from_rules(preset("v2.5"), Rules.from_text(rules)).check(80 * GB).ok == fits

    def test_another_split_of_the_layers(self):
        text = r"""
stages: 2
rules:
  - {match: 'model\.embed_tokens|model\.layers\.[0-9]\..*', stage: 0}
  - {match: '.*', stage: 1}
"""
        plan = Plan.from_rules(preset("v2-lite"), Rules.from_text(text))
        assert any("layers in the stages in place of 10, 17" in c for c in plan.check(7 * GB).changes)

    def test_a_wider_mesh(self):
        path = next(p for p in CONFIGS if p.match("*v2.5/2gpu.yaml"))
        assert any("`tensor: 4`" in change for change in config_plan(path).check(60 * GB).changes)

    def test_nothing_simple_helps(self):
        plan = Plan.from_rules(preset("v2.5"), Rules.from_text("rules: []"))
        assert "no single change" in str(plan.check(GB))

    def test_memory_must_speak_of_all_devices(self):
        plan = config_plan(next(p for p in CONFIGS if p.match("*v2.5/3gpu.yaml")))
        with pytest.raises(KtxError, match="the plan also uses gpu:2"):
            plan.check([80 * GB, 80 * GB])


class TestAuto:
    @pytest.mark.parametrize("memory", [[160], [80, 80, 24], [24], [8, 12], [24, 24, 80, 80]])
    def test_what_it_chooses_fits(self, memory):
        room = [size * GB for size in memory]
        text = choose_rules(preset("v2.5"), "q4_k_m", room, Sizes())
        plan = Plan.from_rules(preset("v2.5"), Rules.from_text(text), devices=len(memory))
        assert plan.check(room).ok
        assert len(text.splitlines()) < 10
        assert ("cpu" in plan.devices) == (sum(memory) < 150)

    def test_what_cannot_fit(self):
        with pytest.raises(KtxError, match="even with all experts on the host"):
            choose_rules(preset("v2.5"), "q4_k_m", [4 * GB], Sizes())
        with pytest.raises(KtxError, match=r"must lie on the host, which takes 1.* GB; it has 64\.0 GB"):
            choose_rules(preset("v2.5"), "q4_k_m", [24 * GB], Sizes(), host_memory=64 * GB)


def test_sizes_are_checked():
    rules = Rules.from_text("rules: []")
    for arguments in ({"context": 1}, {"context": 10**6}, {"batch": 0}, {"dtype": "float16"}):
        with pytest.raises(KtxError):
            Plan.from_rules(preset("v2-lite"), rules, **arguments)
