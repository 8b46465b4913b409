# SPDX-License-Identifier: Apache-2.0
"""Filling the model from files of every layout, and the files that cannot fill it."""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as T
from golden_models import BY_NAME, golden_config, golden_path

from ktx_jax.gguf.errors import GGUFError
from ktx_jax.gguf.names import tensor_name
from ktx_jax.gguf.quantize import quantize
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.gguf.writer import TensorSource, write_gguf
from ktx_jax.model.config import config_from_gguf
from ktx_jax.quantized import QuantizedArray
from ktx_jax.sharding.auto import Sizes
from ktx_jax.sharding.load import Implementations, load_model
from ktx_jax.sharding.mesh import bind
from ktx_jax.sharding.parameters import parameter_shapes
from ktx_jax.sharding.run import plan_run

CPU = jax.devices("cpu")[0]
Tensors = dict[str, TensorSource]


def load(path: Path, override=None, progress=None) -> dict[str, jax.Array | QuantizedArray]:
    """Parameters by path; the file is closed again by then."""
    with open_gguf(path) as gguf:
        config = config_from_gguf(gguf.metadata, gguf.tensors, override=override)
        plan = plan_run(gguf, config, None, [CPU], Sizes(context=64))
        xla = Implementations("xla", "xla")
        [stage] = load_model(gguf, plan, bind(plan, [CPU]), implementations=xla, progress=progress).stages
    flat = nnx.to_flat_state(stage.decode.state)
    return {".".join(map(str, key[:-1])): leaf.get_value() for key, leaf in flat}


def values(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors, dequantized by gguf-py."""
    with open_gguf(path) as gguf:
        return {
            name: quants.dequantize(gguf.blocks(name).reshape(*info.shape[:-1], -1), info.ggml_type)
            for name, info in gguf.tensors.items()
        }


def dense(leaf: jax.Array | QuantizedArray) -> np.ndarray:
    return np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf)


def changed(folder: Path, name: str, change: Callable[[Tensors], None]) -> Path:
    """A copy of a reference model with its tensors changed."""
    with open_gguf(golden_path(BY_NAME[name])) as gguf:
        tensors = {n: TensorSource(n, i.shape, i.ggml_type, gguf.blocks(n)) for n, i in gguf.tensors.items()}
        metadata = {key: value for key, value in gguf.metadata.items() if not key.startswith("split.")}
        change(tensors)
        write_gguf(folder / "changed.gguf", metadata, tensors.values())
    return folder / "changed.gguf"


def tensor(name: str, value: np.ndarray, kind: T = T.F16) -> TensorSource:
    return TensorSource(name, value.shape, kind, quantize(value.astype(np.float32), kind))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_parameter_is_its_tensor(name):
    variant, config = BY_NAME[name], golden_config(name)
    leaves, truth = load(golden_path(variant), variant.override), values(golden_path(variant))
    shapes = parameter_shapes(config)
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    heads, nope, width = config.num_attention_heads, config.qk_nope_head_dim, config.moe_intermediate_size
    for path, leaf in leaves.items():
        layer, _, module = path.rpartition(".")
        if variant.old and module in ("k_b_proj", "v_b_proj"):
            whole = truth[tensor_name(f"{layer}.kv_b_proj")].reshape(heads, -1, config.kv_lora_rank)
            expected = whole[:, :nope] if module == "k_b_proj" else whole[:, nope:]
        elif variant.fused and path.endswith(("experts.gate_proj", "experts.up_proj")) and "shared" not in path:
            whole = truth[tensor_name(f"{layer}.gate_up_proj")]
            expected = whole[:, :width] if module == "gate_proj" else whole[:, width:]
        else:
            expected = truth[tensor_name(path)]
        np.testing.assert_array_equal(dense(leaf), expected, err_msg=path)


def test_weights_stay_quantized_and_small_ones_are_float32():
    leaves = load(golden_path(BY_NAME["grouped"]))
    for path, leaf in leaves.items():
        assert isinstance(leaf, QuantizedArray) == (len(leaf.shape) > 1 and not path.endswith("mlp.gate")), path
    assert leaves["lm_head"].ggml_type == T.Q6_K
    assert leaves["model.layers.1.mlp.gate"].dtype == np.float32


def test_progress_counts_every_byte():
    seen = []
    load(golden_path(BY_NAME["split"]), progress=lambda *step: seen.append(step))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


def test_both_layouts_in_one_file(tmp_path, caplog):
    """Some files carry attn_kv_b beside attn_k_b and attn_v_b: the split tensors are read, and nothing is said."""

    def change(tensors: Tensors) -> None:
        for layer in range(2):
            name = f"blk.{layer}.attn_kv_b.weight"
            tensors[name] = tensor(name, np.zeros((2 * 64, 32)))

    path = changed(tmp_path, "split", change)
    assert dense(load(path)["model.layers.0.self_attn.k_b_proj"]).any()
    assert not caplog.records


def test_routers_and_norms_of_any_float_type(tmp_path):
    def change(tensors: Tensors) -> None:
        for name in ("blk.1.ffn_gate_inp.weight", "output_norm.weight"):
            tensors[name] = tensor(name, np.arange(np.prod(tensors[name].shape)).reshape(tensors[name].shape), T.BF16)

    leaves = load(changed(tmp_path, "split", change))
    np.testing.assert_array_equal(leaves["model.norm"], np.arange(32, dtype=np.float32))
    assert leaves["model.layers.1.mlp.gate"].dtype == np.float32


@pytest.mark.parametrize("kind", [T.IQ2_XXS, T.TQ2_0, T.MXFP4], ids=lambda kind: kind.name)
def test_rare_types_become_q8_0_and_it_is_said(kind, tmp_path, caplog):
    rng, names = np.random.default_rng(0), ("blk.1.ffn_up_exps.weight", "blk.2.ffn_gate_exps.weight")
    size, nbytes = GGML_QUANT_SIZES[kind]

    def change(tensors: Tensors) -> None:
        for name in names:
            shape = tensors[name].shape
            blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, nbytes), dtype=np.uint8)
            if kind == T.MXFP4:
                blocks[..., 0] = 120  # the exponent
            else:
                at = 0 if kind == T.IQ2_XXS else nbytes - 2
                blocks[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            tensors[name] = TensorSource(name, shape, kind, blocks)

    path = changed(tmp_path, "grouped", change)
    leaf, truth = load(path)["model.layers.1.mlp.experts.up_proj"], values(path)[names[0]]
    assert leaf.ggml_type == T.Q8_0
    error = np.linalg.norm(dense(leaf) - truth) / np.linalg.norm(truth)
    assert error < 1e-2
    [record] = caplog.records
    assert record.getMessage().startswith(f"2 tensors of type {kind.name} were converted to Q8_0 while loading")


def test_tensors_that_are_not_read_are_named(tmp_path, caplog):
    def change(tensors: Tensors) -> None:
        for name in ("rope_freqs.weight", "blk.1.exp_probs_b.bias", "blk.7.attn_q.weight"):
            tensors[name] = tensor(name, np.ones(32))

    with caplog.at_level(logging.WARNING, "ktx_jax"):
        load(changed(tmp_path, "split", change))
    [record] = caplog.records
    text = record.getMessage()
    assert "3 tensors are not part of the model and are not read" in text
    assert all(name in text for name in ("rope_freqs.weight", "blk.1.exp_probs_b.bias", "blk.7.attn_q.weight"))


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up_exps.weight", "blk.0.attn_v_b.weight"]
)
def test_a_missing_tensor_is_named_before_anything_is_read(name, tmp_path):
    path = changed(tmp_path, "split", lambda tensors: tensors.pop(name))
    with pytest.raises(GGUFError) as error:
        load(path, progress=lambda *_: pytest.fail("a tensor was read"))
    assert f"tensor '{name}' is missing" in str(error.value)
    assert str(path) in str(error.value)


def test_a_wrong_shape_is_an_error_that_shows_both(tmp_path):
    def change(tensors: Tensors) -> None:
        tensors["blk.0.ffn_up.weight"] = tensor("blk.0.ffn_up.weight", np.zeros((32, 64)))

    with pytest.raises(GGUFError) as error:
        load(changed(tmp_path, "split", change), progress=lambda *_: pytest.fail("a tensor was read"))
    text = str(error.value)
    assert "blk.0.ffn_up.weight (model.layers.0.mlp.up_proj) has shape 32 x 64" in text
    assert "64 x 32" in text
    assert "changed.gguf" in text


def test_an_override_that_the_file_denies_is_a_wrong_shape():
    with pytest.raises(GGUFError, match="an override is wrong"):
        load(golden_path(BY_NAME["split"]), {"expert_count": 16})
