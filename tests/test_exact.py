# SPDX-License-Identifier: Apache-2.0
"""The exact path against Hugging Face transformers' float32 logits for the same files' weights."""

import shutil

import numpy as np
import pytest
from golden_models import BY_NAME, LOGITS, golden_llm, golden_path, mean_kl, relative_error

from ktx_jax.llm import LLM

LEGACY = {"expert_group_count": 4, "expert_group_used_count": 2}
ORACLE = {
    "mini/f16.gguf": None,
    "mini/q8_0.gguf": None,
    "mini/q4_k_m.gguf": None,
    "minigroup/q8_0.gguf": None,
    "minigroup/q4_k_m.gguf": None,
    "legacy/q8_0.gguf": LEGACY,
    "split": None,
}


def check(truth: np.ndarray, logits: np.ndarray) -> None:
    assert logits.dtype == np.float32
    assert logits.shape == truth.shape
    assert mean_kl(truth, logits) < 1e-6
    assert relative_error(truth, logits) < 1e-3


@pytest.mark.parametrize("name", BY_NAME)
def test_golden(name):
    check(LOGITS[f"{name}.logits"], golden_llm(name).logits(LOGITS[f"{name}.tokens"].tolist()))


@pytest.mark.parametrize("name", ["grouped", "lite"])
def test_golden_in_bfloat16(name):
    logits = golden_llm(name, "bfloat16").logits(LOGITS[f"{name}.tokens"].tolist())
    by_token = [mean_kl(*pair) for pair in zip(LOGITS[f"{name}.logits"], logits, strict=True)]
    # The rounding may tip a near tie in the router, which sends one token to another expert.
    assert np.mean(sorted(by_token)[:-1]) < 2e-3
    assert max(by_token) < 0.2


@pytest.mark.parametrize(
    "override",
    [
        {"expert_group_used_count": 4},
        {"rope.scaling.yarn_log_multiplier": 0.0},
    ],
    ids=lambda override: next(iter(override)),
)
def test_golden_files_would_show_an_error(override):
    """The reference logits tell a model that differs in one constant from the right one."""
    logits = LLM(
        golden_path(BY_NAME["grouped"]), dtype="float32", implementation="xla", context=64, batch=1, override=override
    ).logits(LOGITS["grouped.tokens"].tolist())
    assert relative_error(LOGITS["grouped.logits"], logits) > 1e-2


def test_a_directory_is_a_model(tmp_path):
    for part in golden_path(BY_NAME["split"]).parent.glob("split-*.gguf"):
        shutil.copy(part, tmp_path)
    llm = LLM(tmp_path, dtype="float32", implementation="xla", context=256, batch=4)
    check(LOGITS["split.logits"], llm.logits(LOGITS["split.tokens"].tolist()))


@pytest.mark.parametrize("name", ORACLE)
def test_oracle(oracle, name):
    truth, tokens = oracle_logits(oracle, name)
    llm = LLM(oracle / name, dtype="float32", implementation="xla", context=256, batch=2, override=ORACLE[name])
    check(truth, llm.logits(tokens))


@pytest.mark.parametrize("name", ORACLE)
def test_oracle_in_bfloat16(oracle, name):
    truth, tokens = oracle_logits(oracle, name)
    llm = LLM(oracle / name, dtype="bfloat16", implementation="xla", context=256, batch=2, override=ORACLE[name])
    assert mean_kl(truth, llm.logits(tokens)) < 2e-3


def oracle_logits(oracle, name):
    folder, _, file = name.partition("/")
    saved = np.load(oracle / ("mini" if folder == "split" else folder) / "logits.npz")
    return saved[file.removesuffix(".gguf") or "q8_0"], saved["tokens"].tolist()
