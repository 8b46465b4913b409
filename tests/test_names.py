# SPDX-License-Identifier: Apache-2.0
"""GGUF names and module paths stand for each other."""

import pytest
from golden_models import BY_NAME, golden_config, golden_path

from ktx_jax.gguf.names import _BLOCK, _TOP, module_path, tensor_name
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.sharding.parameters import parameter_shapes

NAMES = [f"{name}.weight" for name in _TOP] + [f"blk.{layer}.{n}.weight" for n in _BLOCK for layer in (0, 7, 59)]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    path = module_path(name)
    assert path is not None
    assert tensor_name(path) == name


def test_paths_are_distinct():
    assert len({module_path(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    "name",
    ["", "blk.0.attn_q.bias", "blk.x.attn_q.weight", "blk.0.conv.weight", "output_norm.bias", "rope_freqs.weight"],
)
def test_other_names_are_none(name):
    assert module_path(name) is None


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.rotary", "model.layers.x.mlp.gate", "lm_head.weight", ""])
def test_other_paths_are_errors(path):
    with pytest.raises(KeyError):
        tensor_name(path)


def test_the_paths_are_those_of_the_modules():
    """Every parameter of the model has a GGUF name, and every tensor of the files in the new layout is a parameter."""
    for name in ("grouped", "lite", "tied"):
        with open_gguf(golden_path(BY_NAME[name])) as gguf:
            assert {tensor_name(path) for path in parameter_shapes(golden_config(name))} == set(gguf.tensors)
