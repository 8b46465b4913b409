# SPDX-License-Identifier: Apache-2.0
"""Reading collectives from HLO text, in the forms that XLA's CPU and GPU compilers write."""

import pytest

from ktx_jax.aot.hlo import CompiledCollective, read_collectives, read_kernels

# Cut from compiled programs: a loop of known length, a branch, a fusion, an async pair and a wrapped async computation.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[8,5120])) -> (s32[], bf16[8,5120]) {
  %state = (s32[], bf16[8,5120]{1,0}) parameter(0)
  %x = bf16[8,5120]{1,0} get-tuple-element(%state), index=1
  %all-reduce.1 = bf16[8,5120]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(step)/layers.7/o_proj/psum" stack_frame_id=3}
  ROOT %out = (s32[], bf16[8,5120]{1,0}) tuple(%n, %all-reduce.1)
}

%condition (state: (s32[], bf16[8,5120])) -> pred[] {
  %state.1 = (s32[], bf16[8,5120]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%n, %m), direction=LT
}

%unknown_body (x: f32[16]) -> f32[16] {
  %x.1 = f32[16]{0} parameter(0)
  ROOT %permuted = f32[16]{0} collective-permute(%x.1), channel_id=4, source_target_pairs={{0,1},{1,0}}, metadata={op_name="ring"}
}

%unknown_condition (x: f32[16]) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%scattered (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[16]{0} reduce-scatter(%p), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%branch (p: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  ROOT %a2a = f32[4]{0} all-to-all(%p.2), channel_id=6, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %x.3 = f32[8]{0} parameter(0)
  %w = (s32[], bf16[8,5120]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %u = f32[16]{0} while(%y), condition=%unknown_condition, body=%unknown_body
  %gather = (f32[8,100]{1,0}, f32[8,800]{1,0}) all-gather-start(%logits), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(step)/lm_head/all_gather"}
  %gathered = f32[8,800]{1,0} all-gather-done(%gather)
  %pair = (f32[4]{0}, /*index=1*/bf16[2]{0}) all-reduce(%p, %q), channel_id=3, replica_groups={}, to_apply=%add
  %started = ((f32[64]{0}), f32[16]{0}, s32[]) async-start(%r), calls=%scattered
  %done = f32[16]{0} async-done(%started)
  %chosen = f32[4]{0} conditional(%i, %v, %v), branch_computations={%branch, %branch}
  ROOT %fusion = f32[8]{0} fusion(%x.3), kind=kLoop, calls=%add
}
"""  # noqa: E501


def test_every_form_is_read():
    four = ((0, 1, 2, 3), (4, 5, 6, 7))
    assert read_collectives(TEXT) == [
        CompiledCollective("all-reduce", 4, four, 2 * 8 * 5120, 3, True, "jit(step)/layers.7/o_proj/psum"),
        CompiledCollective("collective-permute", 2, ((0, 1), (1, 0)), 64, 1, False, "ring"),
        CompiledCollective("all-gather", 8, (tuple(range(8)),), 4 * 800 * 8, 1, True, "jit(step)/lm_head/all_gather"),
        CompiledCollective("all-reduce", None, (), 16, 1, True, ""),
        CompiledCollective("all-reduce", None, (), 4, 1, True, ""),
        CompiledCollective("reduce-scatter", 4, four, 4 * 64, 1, True, ""),
        *2 * [CompiledCollective("all-to-all", 2, ((0, 4), (1, 5), (2, 6), (3, 7)), 16, 1, True, "")],
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%r = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=8]", "groups of devices"),
        ("%r = wide[8]{0} all-reduce(%x), replica_groups={}", "number type"),
    ],
)
def test_what_is_not_understood_is_an_error(line, said):
    with pytest.raises(ValueError, match=said):
        read_collectives(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n")


def test_no_entry_is_an_error():
    with pytest.raises(ValueError, match="no entry"):
        read_collectives("")


def test_kernels_that_a_program_starts():
    text = """\
HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, metadata={op_name="jit(f)/layers.3/add"}
  ROOT %t = (s32[], f32[8]) tuple(%x, %y)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/layers.3/mul"}
  %b = f32[8]{0} bitcast(%k)
  %w = (s32[], f32[8]) while(%b), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[8], u32[]) copy-start(%b)
  ROOT %d = f32[8]{0} copy-done(%s)
}
"""
    assert [(k.kind, k.count) for k in read_kernels(text)] == [("mosaic_gpu_v2", 1), ("fusion", 5), ("copy-start", 1)]
    assert read_kernels(text)[0].where == "jit(f)/layers.3/mul"


def test_a_branch_that_layers_share_belongs_to_the_one_that_takes_it():
    text = """
%branch (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(f)/layers.0/attend/cond/add"}
}

ENTRY %main (a: f32[8], i: pred[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %i = pred[] parameter(1)
  %c = f32[8]{0} conditional(%i, %a, %a), true_computation=%branch, false_computation=%none, metadata={op_name="jit(f)/layers.0/attend/cond"}
  ROOT %d = f32[8]{0} conditional(%i, %c, %c), true_computation=%branch, false_computation=%none, metadata={op_name="jit(f)/layers.12/attend/cond"}
}
"""  # noqa: E501
    assert [k.where for k in read_kernels(text)] == [
        "jit(f)/layers.0/attend/cond/add", "jit(f)/layers.12/attend/cond/add"
    ]  # fmt: skip
