# SPDX-License-Identifier: Apache-2.0
"""ktransformers' dialect, read as ktransformers reads it."""

import pytest
from plan_golden import preset

from ktx_jax.sharding.choices import Ops
from ktx_jax.sharding.convert import convert_ktransformers
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.rules import Rules

M, O = "ktransformers.models.modeling_deepseek", "ktransformers.operators"


def rule(name, device, cls=None, replace="default", **kwargs):
    """One rule, on one device unless kwargs say more."""
    match = f"{{name: '{name}'{f', class: {cls}' if cls else ''}}}"
    options = {"generate_device": f"'{device}'", "prefill_device": f"'{device}'"} | kwargs
    said = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"- {{match: {match}, replace: {{class: {replace}, kwargs: {{{said}}}}}}}\n"


def three_gpus(first):
    """Layers 0-19 to GPU 0, 20-39 to GPU 1, the rest to GPU 2; rotary embeddings by rules of their own."""
    parts = ((first, "cuda:0"), (r"[23][0-9]", "cuda:1"), (r"[45][0-9]", "cuda:2"))
    text = "".join(
        rule(rf"^model\.layers\.({layers})\.", device, f"{M}.DeepseekV2YarnRotaryEmbedding",
             f"{O}.RoPE.YarnRotaryEmbedding")
        + rule(rf"^model\.layers\.({layers})\.", device)
        for layers, device in parts
    )  # fmt: skip
    return text + rule(r"^model\.norm|^lm_head", "cuda:2")


def plan(text, model="v2.5"):
    return Plan.from_rules(preset(model), Rules.from_text(text, "rules.yaml"))


@pytest.mark.parametrize("first", [r"[0-9]|1[0-9]", r"[0-1][0-9]"])
def test_layers_over_three_gpus_with_rotary_embeddings_apart(first):
    made = plan(three_gpus(first))
    assert [stage.layers for stage in made.stages] == [tuple(range(20)), tuple(range(20, 40)), tuple(range(40, 60))]
    assert [stage.devices for stage in made.stages] == [("gpu:0",), ("gpu:1",), ("gpu:2",)]


def test_one_digit_layers_that_a_regex_misses_are_named():
    made = plan(three_gpus(r"[0-1][0-9]"))
    assert "model.layers.0-9.self_attn.q_a_proj" in made.notices[0]
    assert "placed on gpu:0" in made.notices[0]
    assert "10" not in made.notices[0].partition(" placed")[0].replace("102400", "")


def test_the_first_rule_that_matches_takes_all():
    text = rule("q_a_proj$", "cuda:0", cls="torch.nn.Linear", generate_op="KLinearTorch") + rule(
        ".*", "cuda:0", generate_op="KLinearMarlin"
    )
    # The second rule matches experts too, which a linear operator cannot compute: cut it down to matrices.
    text = text.replace("{name: '.*'}", "{name: 'o_proj$'}")
    by_path = {p.path: p for p in plan(text).parameters}
    assert by_path["model.layers.3.self_attn.q_a_proj"].ops == Ops("xla", "xla")
    assert by_path["model.layers.3.self_attn.o_proj"].ops == Ops("pallas", "pallas")
    assert by_path["model.layers.3.self_attn.q_b_proj"].ops == Ops()


def test_classes_choose_modules():
    text = rule("mlp$", "cpu", cls=f"{M}.DeepseekV2MLP") + rule("mlp", "cpu", cls="torch.nn.Embedding")
    made = plan(text, "v2-lite")
    assert made.devices == ("gpu:0",)  # a rule for the dense MLP itself places no matrix inside it
    assert any("takes no module" in notice for notice in made.notices)


def test_what_is_not_recursive_takes_what_is_inside():
    text = "- {match: {name: 'mlp.experts$'}, replace: {kwargs: {generate_device: cpu}}, recursive: False}\n"
    homes = {p.devices for p in plan(text).parameters if ".experts." in p.path and ".shared_" not in p.path}
    assert homes == {("cpu",)}


def test_experts_can_be_placed_one_by_one_if_all_go_together():
    text = rule(r"mlp\.experts\.\d+\.", "cpu")
    homes = {p.devices for p in plan(text, "v2-lite").parameters if ".mlp.experts." in p.path}
    assert homes == {("cpu",)}


EXPERTS = (
    "- match: {name: 'mlp.experts$'}\n"
    "  replace: {class: x.KTransformersExperts, kwargs: {generate_device: cpu, generate_op: KExpertsCPU,"
    " prefill_device: cuda, prefill_op: KExpertsTorch}}\n"
    "  recursive: False\n"
)


@pytest.mark.parametrize(
    ("model_rule", "threshold"),
    [
        ("", None),
        ("- {match: {name: '^model$'}, replace: {class: x.KDeepseekV2Model}}\n", 30000),
        ("- {match: {name: '^model$'}, replace: {kwargs: {per_layer_prefill_intput_threshold: 0}}}\n", None),
        ("- {match: {name: '^model$'}, replace: {kwargs: {per_layer_prefill_intput_threshold: 99}}}\n", 99),
    ],
)
def test_prefill_devices_act_above_the_threshold(model_rule, threshold):
    made = plan(EXPERTS + model_rule)
    expert = next(p for p in made.parameters if ".experts.up_proj" in p.path)
    assert made.prefill_threshold == threshold
    assert expert.prefill_device == ("gpu:0" if threshold else None)
    assert expert.ops == (Ops("xla", "ffi") if threshold else Ops("ffi", "ffi"))
    assert bool(made.needs["gpu:0"].streamed) == bool(threshold)
    assert any("has no effect" in notice for notice in made.notices) == (threshold is None)
    converted = Plan.from_rules(preset("v2.5"), Rules.from_text(convert_ktransformers(
        Rules.from_text(EXPERTS + model_rule), preset("v2.5"))))  # fmt: skip
    assert converted.parameters == made.parameters
    assert converted.prefill_threshold == threshold


def test_a_head_left_behind_is_a_stage_of_its_own():
    made = plan(rule("^model", "cuda:1"), "v2-lite")
    assert [stage.devices for stage in made.stages] == [("gpu:1",), ("gpu:0",)]
    assert made.stages[1].others == ("lm_head",)
    text = convert_ktransformers(Rules.from_text(rule("^model", "cuda:1")), preset("v2-lite"))
    assert Plan.from_rules(preset("v2-lite"), Rules.from_text(text)).parameters == made.parameters


def test_operators_for_gpus_give_way_on_cpus():
    text = "- {match: {name: 'o_proj'}, replace: {kwargs: {generate_op: KLinearMarlin}}}\n"
    made = Plan.from_rules(preset("v2-lite"), Rules.from_text(text), platform="cpu")
    assert {p.ops.decode for p in made.parameters} == {None}
    assert any("'pallas' computes on GPUs" in notice for notice in made.notices)


def test_options_without_a_meaning_here_are_said():
    text = "- {match: {name: 'self_attn$'}, replace: {kwargs: {absorb_for_prefill: False, backend: llamafile}}}\n"
    said = " ".join(plan(text, "v2-lite").notices)
    assert "absorb_for_prefill" in said
    assert "llamafile" in said
