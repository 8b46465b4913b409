# SPDX-License-Identifier: Apache-2.0
"""The reference models of `tests/golden`, opened once for all tests that use them."""

from functools import cache
from pathlib import Path

import numpy as np
from golden.golden_variants import VARIANTS, Variant

from ktx_jax.engine.engine import Engine
from ktx_jax.engine.scheduler import Limits
from ktx_jax.engine.stage import Dtypes
from ktx_jax.engine.step import Steps
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.llm import LLM
from ktx_jax.model.config import Config, config_from_gguf

FOLDER = Path(__file__).with_name("golden")
LOGITS = np.load(FOLDER / "logits.npz")
BY_NAME = {variant.name: variant for variant in VARIANTS}


def golden_path(variant: Variant) -> Path:
    """The variant's file; of a split one, the last part."""
    part = f"-{variant.parts:05d}-of-{variant.parts:05d}" if variant.parts > 1 else ""
    return FOLDER / f"{variant.name}{part}.gguf"


def golden_config(name: str) -> Config:
    variant = BY_NAME[name]
    with open_gguf(golden_path(variant)) as gguf:
        return config_from_gguf(gguf.metadata, gguf.tensors, override=variant.override)


@cache
def golden_llm(name: str, dtype: str = "float32", context: int = 256, batch: int = 4) -> LLM:
    variant = BY_NAME[name]
    return LLM(
        golden_path(variant), dtype=dtype, context=context, batch=batch, implementation="xla",
        override=variant.override,
    )  # fmt: skip


# Buckets of 8 and 32 tokens at prefill, of 1 and 2 at decode; pages of 64; three pages a sequence.
SMALL_LIMITS = Limits(context=160, batch=2, page=64, chunk=32, tile=8)


@cache
def small_llm() -> LLM:
    """A reference model on an engine of few, small shapes: page and bucket edges are near, compilation is short."""
    llm = golden_llm("split", context=SMALL_LIMITS.context, batch=SMALL_LIMITS.batch)
    steps = Steps(llm.config, llm._model, SMALL_LIMITS, dtypes=Dtypes(llm.dtype, llm.dtype))
    llm._engine = Engine(llm.config, steps, SMALL_LIMITS, eos_ids=llm.tokenizer.eos_ids)
    return llm


def token_kl(truth: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Nats from each token's distribution of `truth` to that of `logits`, computed in float64."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in map(np.float64, (truth, logits)))
    return (np.exp(p) * (p - q)).sum(-1)


def mean_kl(truth: np.ndarray, logits: np.ndarray) -> float:
    """The mean of `token_kl`."""
    return float(token_kl(truth, logits).mean())


def relative_error(truth: np.ndarray, logits: np.ndarray) -> float:
    """Norm of the difference over the norm of the truth."""
    return float(np.linalg.norm(np.float64(logits) - truth) / np.linalg.norm(np.float64(truth)))
