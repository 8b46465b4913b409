# SPDX-License-Identifier: Apache-2.0
"""Collectives and least times that follow from a plan, without JAX."""

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_golden import CONFIGS, ROOT, config_plan, preset

from ktx_jax.sharding.collectives import Collective, predict_collectives
from ktx_jax.sharding.experts_used import experts_used
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.roofline import collective_seconds, hosts_of, pipelined, roofline
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.step_size import PHASES, step_size
from ktx_jax.sharding.targets import load_target

V25 = ROOT / "configs" / "deepseek-v2.5"
H200, CPU = load_target("h200"), load_target("cpu")
DEVICES = tuple(f"gpu:{i}" for i in range(64))


def counted(plan, phase="decode"):
    found = predict_collectives(plan, step_size(plan, phase))
    return Counter((c.kind, c.devices, c.nbytes) for c in found)


def test_two_sums_a_layer_one_for_the_embedding_and_logits_gathered():
    plan = config_plan(V25 / "8gpu.yaml")  # a batch of 8, bfloat16
    assert counted(plan) == {("all-reduce", 8, 8 * 5120 * 2): 121, ("all-gather", 8, 8 * 102400 * 4): 1}
    assert counted(plan.resized(batch=2))[("all-reduce", 8, 2 * 5120 * 2)] == 121
    assert counted(plan, "prefill")[("all-reduce", 8, 512 * 5120 * 2)] == 121


def test_each_data_group_exchanges_its_own_tokens():
    plan = config_plan(V25 / "8gpu-data.yaml")
    assert counted(plan) == {("all-reduce", 4, 4 * 5120 * 2): 121, ("all-gather", 4, 4 * 102400 * 4): 1}


@pytest.mark.parametrize("path", [p for p in CONFIGS if "1gpu" in p.name or "3gpu" in p.name or "kt" in p.name])
def test_devices_on_their_own_exchange_nothing(path):
    assert not counted(config_plan(path))


def test_what_is_cut_otherwise_is_gathered():
    rules = r"""
mesh: {expert: 2, tensor: 2}
rules:
  - {match: '.*\.(q_a_proj|kv_a_proj_with_mqa)', shard: [tensor], replicate: expert}
  - {match: '.*\.mlp\.gate', shard: [tensor], replicate: expert}
  - {match: '.*\.(q_b_proj|k_b_proj)', shard: [tensor], replicate: expert}
  - {match: '.*\.v_b_proj', shard: [expert], replicate: tensor}
  - {match: '.*\.o_proj', shard: [null, expert], replicate: tensor}
  - {match: '.*\.shared_experts\.(gate|up)_proj', shard: [tensor], replicate: expert}
  - {match: '.*\.shared_experts\.down_proj', shard: [null, tensor], replicate: expert}
  - {match: '.*\.experts\..*', shard: [expert], replicate: tensor}
  - {match: '.*', shard: replicate}
"""
    config = dataclasses.replace(preset("v2.5"), num_hidden_layers=2)
    plan = Plan.from_rules(config, Rules.from_text(rules), batch=3)
    found = predict_collectives(plan, step_size(plan, "decode"))
    row = 3 * 2  # tokens, bytes of a bfloat16
    layer = "model.layers.1"
    assert [c for c in found if c.where.startswith(layer)] == [
        Collective("all-gather", f"{layer}.self_attn.q_a_proj", 0, ("tensor",), 2, row * 1536),
        Collective("all-gather", f"{layer}.self_attn.kv_a_proj_with_mqa", 0, ("tensor",), 2, row * 576),
        Collective("all-gather", f"{layer}.self_attn.v_b_proj", 0, ("tensor",), 2, row * 128 * 512),
        Collective("all-reduce", f"{layer}.self_attn.o_proj", 0, ("expert",), 2, row * 5120),
        Collective("all-gather", f"{layer}.mlp.gate", 0, ("tensor",), 2, 3 * 4 * 160),
        Collective("all-reduce", f"{layer}.mlp.experts.down_proj", 0, ("expert",), 2, row * 5120),
        Collective("all-reduce", f"{layer}.mlp.shared_experts.down_proj", 0, ("tensor",), 2, row * 5120),
    ]
    assert {c.where.split(".")[2] for c in found} == {"0", "1"}  # nothing for the embedding and the head


@given(tokens=st.integers(1, 64))
@settings(deadline=None, max_examples=12)
def test_distinct_experts_are_as_many_as_chance_has_it(tokens):
    config = preset("v2.5")
    used = experts_used(config, tokens, 8)
    expected = 160 * (1 - (1 - 6 / 160) ** tokens)
    assert used.distinct == pytest.approx(expected, rel=0.05)
    assert used.distinct / 8 <= used.busiest <= min(20, 6 * tokens)
    assert 6 * tokens / 8 <= used.pairs <= 6 * tokens
    assert experts_used(config, tokens, 1).busiest == experts_used(config, tokens, 1).distinct


def test_groups_load_few_devices():
    """A token of V2.5 uses 3 of 8 groups: with a group a device, one of them has at least two of its six experts."""
    assert experts_used(preset("v2.5"), 1, 8).busiest >= 2


def test_one_device_reads_what_a_token_needs():
    plan = config_plan(V25 / "1gpu.yaml").resized(batch=1, context=1024)
    [stage] = roofline(plan, H200, step_size(plan, "decode"), host=CPU).stages
    sizes = {p.path: p.nbytes for p in plan.parameters}
    experts = sum(size for path, size in sizes.items() if ".mlp.experts." in path)
    rest = sum(sizes.values()) - experts - sizes["model.embed_tokens"] * (1 - 1 / 102400)
    assert stage.weight_bytes == pytest.approx(rest + experts * 6 / 160)
    assert stage.cache_bytes == 60 * 1024 * 576 * 2
    assert stage.memory_s == pytest.approx((stage.weight_bytes + stage.cache_bytes) / 4.8e12)
    assert stage.seconds == stage.memory_s  # nothing else binds
    # V2.5 activates 21 billion parameters a token; attention over 1024 positions adds to that.
    attention = 60 * 2 * 128 * 1024 * (576 + 512)
    assert (stage.operations - attention) / 2 == pytest.approx(21e9, rel=0.03)


def test_more_devices_take_less_until_exchanges_bind():
    times = []
    for name in ("1gpu", "2gpu", "4gpu", "8gpu"):
        plan = config_plan(V25 / f"{name}.yaml").resized(batch=1)
        times.append(roofline(plan, H200, step_size(plan, "decode"), host=CPU))
    memory = [sum(s.memory_s for s in r.stages) for r in times]
    assert memory == sorted(memory, reverse=True)
    exchanged = [sum(s.collectives_s for s in r.stages) for r in times]
    assert exchanged == sorted(exchanged)
    assert times[-1].stages[0].collectives_s > times[-1].stages[0].memory_s


def test_a_collective_is_a_ring_and_a_tree():
    mesh = {"data": 8, "tensor": 8}
    one = Collective("all-reduce", "x", 0, ("tensor",), 8, 10**6)
    hop, wire = H200.link_latency, 10**6 / H200.link_bandwidth
    assert collective_seconds(H200, one, DEVICES, mesh) == pytest.approx(2 * (7 / 8 * wire + 7 * hop))
    gather = dataclasses.replace(one, kind="all-gather")
    assert collective_seconds(H200, gather, DEVICES, mesh) == pytest.approx(7 / 8 * wire + 7 * hop)
    # One device of each host: every byte goes through its adapter.
    across = dataclasses.replace(one, axes=("data",))
    network = 10**6 / H200.network_bandwidth
    assert collective_seconds(H200, across, DEVICES, mesh) == pytest.approx(
        2 * (7 / 8 * network + 3 * H200.network_latency)
    )
    # All 64: eight adapters a host side by side.
    everywhere = dataclasses.replace(one, axes=("data", "tensor"), devices=64)
    slowest = max(wire, network / 8)
    assert collective_seconds(H200, everywhere, DEVICES, mesh) == pytest.approx(
        2 * (63 / 64 * slowest + 7 * hop + 3 * H200.network_latency)
    )
    assert hosts_of(H200, DEVICES) == 8


def test_stages_on_other_hosts_pass_on_through_the_network():
    plan = config_plan(V25 / "16gpu.yaml")
    first, last = roofline(plan, H200, step_size(plan, "decode"), host=CPU).stages
    assert first.transfer_s == pytest.approx(8 * 5120 * 2 / H200.network_bandwidth + H200.network_latency)
    assert last.transfer_s == 0


def test_full_stages_let_more_through():
    plan = config_plan(V25 / "8gpu-2stages.yaml").resized(batch=64)
    size = step_size(plan, "decode")
    lone, flowing = roofline(plan, H200, size, host=CPU), pipelined(plan, H200, size, host=CPU)
    assert (lone.in_flight, flowing.in_flight, flowing.tokens) == (1, 2, 32)
    assert lone.tokens_per_second < flowing.tokens_per_second < 2 * lone.tokens_per_second
    alone = plan.resized(batch=1)
    size = step_size(alone, "decode")
    assert pipelined(alone, H200, size, host=CPU) == roofline(alone, H200, size, host=CPU)


def test_experts_on_the_host_cost_its_time():
    plan = config_plan(V25 / "cpu-experts.yaml").resized(batch=1)
    [stage] = roofline(plan, H200, step_size(plan, "decode"), host=CPU).stages
    experts = sum(p.nbytes for p in plan.parameters if ".mlp.experts." in p.path)
    assert stage.host_s > experts * 6 / 160 / CPU.bandwidth
    assert stage.host_s > 0.8 * stage.seconds


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_has_its_times(path):
    plan = config_plan(path)
    for phase in PHASES:
        found = roofline(plan, H200, step_size(plan, phase), host=CPU)
        assert len(found.stages) == len(plan.stages)
        assert all(math.isfinite(stage.seconds) and stage.seconds > 0 for stage in found.stages)
        assert found.tokens == (8 if phase == "decode" else plan.chunk * plan.mesh.get("data", 1))
