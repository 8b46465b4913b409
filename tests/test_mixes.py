# SPDX-License-Identifier: Apache-2.0
"""The type of each tensor under a mix, against real files and the counts that are known."""

import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from ktx_jax.gguf.mixes import MIXES, mix_type


@pytest.mark.parametrize(
    "file",
    ["mini/q4_k_m", "mini/q8_0", "mini/f16", "minigroup/q4_k_m", "minigroup/q8_0", "legacy/q8_0"],
)
def test_types_of_real_mixes(oracle, file):
    reader = GGUFReader(oracle / f"{file}.gguf")
    mix = file.split("/")[1]
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert mix_type(tensor.name, shape, 3, mix) == tensor.tensor_type, tensor.name


def test_ffn_down_of_sixty_layers():
    down = [mix_type(f"blk.{i}.ffn_down_exps.weight", (160, 5120, 1536), 60, "q4_k_m") for i in range(60)]
    assert down.count(T.Q6_K) == 30
    assert set(down[:7]) == set(down[52:]) == {T.Q6_K}
    assert [i for i in range(7, 52) if down[i] == T.Q6_K] == list(range(9, 52, 3))


@pytest.mark.parametrize(
    ("name", "shape", "mix", "want"),
    [
        ("blk.5.attn_k_b.weight", (16, 512, 128), "q4_k_m", T.Q5_0),
        ("blk.5.attn_k_b.weight", (16, 512, 128), "q5_k_m", T.Q5_1),
        ("blk.5.attn_k_b.weight", (16, 512, 128), "q6_k", T.Q8_0),
        ("blk.5.attn_k_b.weight", (16, 512, 128), "iq4_xs", T.IQ4_NL),
        ("blk.5.attn_k_b.weight", (16, 512, 128), "q4_0", T.Q4_0),
        ("blk.4.ffn_down_exps.weight", (64, 2048, 1408), "q4_k_m", T.Q5_0),
        ("blk.5.ffn_down_exps.weight", (64, 2048, 1408), "q4_k_m", T.Q8_0),
        ("blk.1.ffn_down_shexp.weight", (2048, 2816), "iq4_xs", T.Q5_K),
        ("blk.3.ffn_down_shexp.weight", (2048, 2816), "iq4_xs", T.IQ4_XS),
        ("output.weight", (102400, 2048), "q4_0", T.Q6_K),
        ("output.weight", (102400, 2000), "q4_k_m", T.F16),
        ("token_embd.weight", (102400, 2048), "q4_k_m", T.Q4_K),
        ("token_embd.weight", (512, 100), "q8_0", T.F16),
        ("blk.5.ffn_gate_inp.weight", (64, 2048), "q4_k_m", T.F32),
        ("blk.5.exp_probs_b.bias", (64,), "q8_0", T.F32),
        ("output_norm.weight", (2048,), "bf16", T.F32),
        ("blk.5.attn_output.weight", (2048, 2048), "bf16", T.BF16),
        ("blk.5.attn_output.weight", (2048, 2048), "f32", T.F32),
    ],
)
def test_single_tensors(name, shape, mix, want):
    assert mix_type(name, shape, 27, mix) == want


def test_unknown_mix_lists_the_known():
    with pytest.raises(ValueError, match=f"no mix named 'q4_k_x'; there are {', '.join(MIXES)}"):
        mix_type("output.weight", (8, 256), 1, "q4_k_x")
