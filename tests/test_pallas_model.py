# SPDX-License-Identifier: Apache-2.0
"""Whole models on the GPU kernels: planned, loaded as records, sharded, and the same logits as XLA's.

No GPU is here. One test runs every kernel in JAX's interpreter; in the others the kernels' plain references compute.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as T
from gguf import quants
from golden_models import relative_error
from pallas_cases import interpreter
from pallas_models import (
    LONG,
    ONE,
    TINY,
    VOCAB,
    interpreted,
    loaded,
    logits,
    plan_of,
    prompts_interpreted,
    references,
    write_tiny,
)

from ktx_jax import presets
from ktx_jax.errors import KtxError
from ktx_jax.execution import choose_implementations
from ktx_jax.gguf.convert import to_q8_0
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.config import config_from_gguf
from ktx_jax.presets import SHAPES, preset_config
from ktx_jax.quantized import PlanesArray, QuantizedArray
from ktx_jax.sharding.auto import Sizes, choose_rules
from ktx_jax.sharding.choices import Ops
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.problems import RulesError
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.targets import load_target
from pallas_kernels import mla_prefill
from pallas_kernels.formats import FORMATS
from pallas_kernels.unpack import dequantize

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("run_pallas_plans.py")
LITE = preset_config("v2-lite")
ODD_TYPES = (("ffn_gate.", T.Q4_1), ("ffn_up.", T.IQ4_NL), ("attn_output", T.F16), ("attn_q.", T.BF16))


@pytest.fixture
def opened(tmp_path):
    """Writes the tiny model and opens it: the file and its configuration."""
    files = []

    def make(**options):
        gguf = open_gguf(write_tiny(tmp_path / f"{len(files)}.gguf", **options))
        files.append(gguf)
        return gguf, config_from_gguf(gguf.metadata, gguf.tensors, file="tiny")

    yield make
    for gguf in files:
        gguf.close()


def weights(gguf, plan: Plan, decode: bool = True) -> dict:
    [stage] = loaded(gguf, plan).stages
    flat = nnx.to_flat_state(stage.part(decode=decode).state)
    return {".".join(map(str, key[:-1])): leaf.get_value() for key, leaf in flat}


def check(gguf, config, plan: Plan, got: np.ndarray, times: float = 1.3) -> None:
    """As near to the exact logits as XLA's own bfloat16 path is, within so many `times`."""
    prompt = len(got) - 1
    exact, near = (logits(gguf, config, plan.on_xla(), dtype, prompt) for dtype in (jnp.float32, jnp.bfloat16))
    assert relative_error(exact, got) < times * relative_error(exact, near) < 4e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "prompt"),
    [
        pytest.param(interpreted, 20, id="all kernels, a short prompt"),
        pytest.param(prompts_interpreted, LONG, id="expanded attention, a long one"),
    ],
)
def test_a_whole_model_in_the_interpreter(opened, kernels, prompt):
    gguf, config = opened()
    plan = plan_of(gguf, config)
    assert plan.notices == ()
    with kernels(), interpreter():
        got = logits(gguf, config, plan, prompt=prompt)
    assert np.isfinite(got).all()
    check(gguf, config, plan, got)


def test_long_prompts_attend_in_expanded_form(opened):
    """In a step of many tokens, and only where k_b and v_b lie for the kernels."""
    gguf, config = opened()

    def spoilt(*operands, **_):
        return jnp.full_like(operands[-1], jnp.nan)

    def finite(plan: Plan, prompt: int) -> list[bool]:
        with references(), mock.patch.object(mla_prefill, "mla_prefill", spoilt):
            got = np.isfinite(logits(gguf, config, plan, prompt=prompt)).all(axis=1)
        return [bool(got[:prompt].any()), bool(got[prompt])]

    plan = plan_of(gguf, config)
    assert finite(plan, LONG) == [False, False]  # the token that follows reads what the second layer cached
    assert finite(plan, 20) == [True, True]
    rules = Rules.from_text("rules:\n  - {match: '.*[kv]_b_proj', op: xla}\n  - {match: '.*', op: pallas}", "rules")
    assert finite(plan_of(gguf, config, rules, "xla"), LONG) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "notices"),
    [
        ({}, []),
        ({"quant": "iq4_xs"}, ["IQ4_NL becomes Q8_0 for 'pallas', 1.9 times the bytes"]),
        ({"old": True}, ["Q4_K becomes BF16 for 'pallas', 3.6 times the bytes: model.layers.0-1.self_attn.k_b_proj"]),
        ({"types": ODD_TYPES}, ["Q4_1 becomes Q8_0", "IQ4_NL becomes Q8_0", "F16 becomes BF16"]),
    ],
    ids=["Q4_K_M", "IQ4_XS", "k_b and v_b in one", "types without a layout"],
)
def test_a_model_on_the_kernels_answers_as_on_xla(opened, options, notices):
    gguf, config = opened(**options)
    plan = plan_of(gguf, config)
    for said in notices:
        assert any(notice.startswith(said) for notice in plan.notices), plan.notices
    assert len(plan.notices) == len(notices)
    with references():
        got = logits(gguf, config, plan)
    # Q4_1 becomes Q8_0, with an error of its own.
    check(gguf, config, plan, got, times=1.5 if "types" in options else 1.3)


def test_what_is_loaded_is_what_the_plan_says(opened):
    gguf, config = opened(old=True)
    plan = plan_of(gguf, config)
    found = weights(gguf, plan)
    for p in plan.parameters:
        leaf = found[p.path]
        assert leaf.nbytes == p.nbytes, p.path
        packed = len(p.shape) > 1 and not p.path.endswith((".mlp.gate", "embed_tokens"))
        assert isinstance(leaf, PlanesArray) == packed, p.path
    assert {p.path for p in plan.parameters if p.ops.decode != "pallas"} == {"model.embed_tokens"}


def test_a_phase_of_its_own_has_weights_of_its_own(opened):
    gguf, config = opened()
    both, one = (
        plan_of(gguf, config, Rules.from_text(f"rules:\n  - {{match: '.*', op: {op}}}", "rules"), "xla")
        for op in ("{prefill: xla, decode: pallas}", "xla")
    )
    decode, prefill = (weights(gguf, both, decode=d)["lm_head"] for d in (True, False))
    assert isinstance(decode, PlanesArray)
    assert isinstance(prefill, QuantizedArray)
    by_path = {p.path: p for p in both.parameters}
    assert by_path["lm_head"].nbytes == decode.nbytes + prefill.nbytes
    assert both.needs["gpu:0"].weights > 1.9 * one.needs["gpu:0"].weights


class TestWhatTheKernelsCannotTake:
    def test_rows_that_do_not_fill_records_stay_on_xla(self):
        rules = Rules.from_file(ROOT / "configs" / "deepseek-v2-lite" / "4gpu-width.yaml")
        plan = Plan.from_rules(LITE, rules, implementation="pallas")
        by_path = {p.path: p.ops for p in plan.parameters}
        for name in ("gate_proj", "up_proj", "down_proj"):  # one operation: 1408 / 4 = 352 rows of gate
            assert by_path[f"model.layers.3.mlp.experts.{name}"] == Ops("xla", "xla")
        assert by_path["model.layers.3.self_attn.o_proj"] == Ops("pallas", "pallas")
        [said] = [notice for notice in plan.notices if "experts.gate_proj" in notice]
        assert said.endswith("the kernels take rows in 64s, and there are 352 of a piece")
        assert f"note: {said[:80]}" in plan.summary()

    def test_gate_and_up_of_two_types(self, opened):
        gguf, config = opened(types=[("ffn_up_exps", T.Q8_0)])
        plan = plan_of(gguf, config)
        [said] = plan.notices
        assert said.startswith("XLA computes with model.layers.1.mlp.experts.gate_proj")
        assert said.endswith("gate and up of one type, and they are Q4_K and Q8_0")
        with references():
            assert np.isfinite(logits(gguf, config, plan)).all()

    def test_other_latents(self):
        small = preset_config(replace(SHAPES["v2-lite"], kv_lora=256))
        [said] = Plan.from_rules(small, ONE, implementation="pallas").notices
        assert said.startswith("XLA computes the attention itself: ")
        assert said.endswith("latents of 512 + 64 values, and the model has 256 + 64")

    def test_experts_of_two_operators_are_an_error(self):
        rules = Rules.from_text("rules:\n  - {match: '.*experts.gate_proj', op: pallas}", "rules")
        with pytest.raises(RulesError, match=r"rules:2:40: .*a layer's experts are one operation"):
            Plan.from_rules(LITE, rules)


class TestWhereTheyRun:
    PALLAS = Rules.from_text("rules:\n  - {match: '.*', op: pallas}", "rules")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"platform": "cpu"}, r"'pallas' computes on GPUs, but .* is on gpu:0, a CPU"),
            ({"dtype": "float32"}, r"on gpu:0: the GPU kernels compute in bfloat16, not in float32"),
            ({"no_kernels": "they are too old"}, r"'pallas' cannot compute with .* on gpu:0: they are too old"),
        ],
    )
    def test_rules_that_ask_for_them_elsewhere(self, options, said):
        with pytest.raises(RulesError, match=said):
            Plan.from_rules(LITE, self.PALLAS, **options)

    def test_ktransformers_operators_give_way(self):
        rules = Rules.from_file(ROOT / "configs" / "deepseek-v2-lite" / "ktransformers-2gpu.yaml")
        plan = Plan.for_target(LITE, rules, load_target("a100-80g"))
        assert not any(p.ops.decode == "pallas" for p in plan.parameters)
        assert any("for Hopper, compute capability 9.0, and this is 8.0" in notice for notice in plan.notices)

    @pytest.mark.parametrize(
        ("target", "dtype", "op"),
        [("h200", "bfloat16", "pallas"), ("h200", "float32", None), ("a100-80g", "bfloat16", None)],
    )
    def test_what_a_target_takes_by_default(self, target, dtype, op):
        plan = Plan.for_target(LITE, ONE, load_target(target), dtype=dtype)
        assert plan.parameters[-1].ops.decode == op

    @pytest.mark.parametrize(
        ("capability", "name", "dtype", "said"),
        [
            ("9.0", None, "bfloat16", "pallas"),
            ("9.0", "xla", "bfloat16", "xla"),
            ("8.9", None, "bfloat16", "xla: the GPU kernels are for Hopper, compute capability 9.0, and this is 8.9"),
            ("9.0", None, "float32", "xla: the GPU kernels compute in bfloat16, not in float32"),
            (
                None,
                None,
                "bfloat16",
                "xla: the GPU kernels are for Hopper, compute capability 9.0, and this is another",
            ),
            ("8.9", "pallas", "bfloat16", KtxError("implementation 'pallas' cannot run: .* this is 8.9")),
            ("9.0", "pallas", "float32", KtxError("not in float32")),
            ("9.0", "ffi", "bfloat16", KtxError("computes on CPUs")),
        ],
    )
    def test_what_a_run_takes(self, capability, name, dtype, said, caplog):
        devices = [mock.Mock(spec=jax.Device, platform="gpu", compute_capability=capability)] * 2
        if isinstance(said, KtxError):
            with pytest.raises(KtxError, match=str(said)):
                choose_implementations(name, devices, dtype)
            return
        op, _, why = said.partition(": ")
        assert choose_implementations(name, devices, dtype).devices == op
        assert [why in record.getMessage() for record in caplog.records] == [True] * bool(why)

    def test_not_on_cpus(self):
        devices = [mock.Mock(spec=jax.Device, platform="cpu")]
        with pytest.raises(KtxError, match="'pallas' computes on GPUs; the device is"):
            choose_implementations("pallas", devices, "bfloat16")

    def test_rules_chosen_for_them_count_their_bytes(self):
        """A device that just holds the file's blocks does not hold their records, 2.8% larger: some experts go."""
        room = [Plan.from_rules(LITE, ONE).needs["gpu:0"].total + 10_000_000]
        on_xla, on_kernels = (
            choose_rules(LITE, "q4_k_m", room, Sizes(), implementation=op) for op in ("xla", "pallas")
        )
        assert "device: cpu" not in on_xla
        assert "device: cpu" in on_kernels


@pytest.mark.slow
def test_models_cut_over_four_devices():
    """Experts by number and width, inside super-blocks; a prompt that attends in expanded form where k_b and v_b
    are cut alike; in a process of its own, for its devices."""
    done = subprocess.run([sys.executable, WORKER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(found) == {"experts and width", "width alone", "k_b and v_b apart"}
    for line in found.values():
        assert line["error"] < 1.3 * line["error of xla"] < 4e-2
        assert line["on kernels"] == 28
        assert line["planned"] == line["live"]


def test_iq4_nl_becomes_q8_0_exactly():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 4, 18), dtype=np.uint8)
    blocks[..., 1] &= 0x3F  # finite
    converted, error = to_q8_0(blocks, T.IQ4_NL)
    assert error == 0
    np.testing.assert_array_equal(
        quants.dequantize(converted.reshape(3, -1), T.Q8_0), quants.dequantize(blocks.reshape(3, -1), T.IQ4_NL)
    )


@pytest.mark.slow
def test_the_benchmark_of_whole_models_runs(monkeypatch):
    """On weights made as on a GPU, through the engine; the kernels' references compute."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_model

    said: list[str] = []
    shape = replace(TINY, layers=1)
    runs = (
        gpu_model.Run("tiny, decode", shape, "iq4_xs", 2, 16, 3, 100),
        gpu_model.Run("tiny, prompt", shape, "iq4_xs", 1, 32, 1),
        gpu_model.Run("too large", "v2.5", "q4_k_m", 64, 16, 1),
    )
    with mock.patch.object(presets, "VOCAB_SIZE", VOCAB), references():
        decode, prompt = gpu_model.run_models(runs, jax.devices("cpu")[0], said.append)
    assert decode["reply"] > 0
    assert decode["prompt"] > 0
    assert (prompt["reply"], prompt["goal"]) == (0, None)
    assert prompt["prompt"] > 0
    assert "tiny, decode" in said[0]
    assert said[2] == "too large: needs 146 GB, more than this device has free: left out"


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_keep_the_size_of_what_they_meet(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_model

    values = np.asarray(dequantize(gpu_model.random_weight(jax.random.key(1), name, (128, 512)), name))
    assert values.std() == pytest.approx(512**-0.5, rel=0.1)
    assert abs(values.mean()) < 0.15 * values.std()  # -8 to 7 have a mean of -0.5
