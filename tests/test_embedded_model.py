# SPDX-License-Identifier: Apache-2.0
"""The embedded model: small, whole, and it writes documentation, not noise."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ktx_jax import LLM, SamplingParams
from ktx_jax.gguf.reader import open_gguf

DATA = Path(__file__).resolve().parents[1] / "ktx_jax" / "data"
FILES = ("tiny-q8_0.gguf", "tiny-q4_k_m.gguf")
PROSE = (
    "Return True if the object is an instance of the class, or of a subclass thereof, and False otherwise. "
    "If the argument is not a valid type, a TypeError is raised."
)
MOST_NATS_A_CHARACTER = 0.8  # letters at random would cost 3; a unigram model of characters about 2


@pytest.fixture(scope="module", params=FILES)
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(DATA / request.param, context=512, batch=2, dtype="float32")


def test_both_files_fit_in_six_megabytes() -> None:
    assert sum((DATA / name).stat().st_size for name in FILES) <= 6_000_000


@pytest.mark.parametrize("name", FILES)
def test_file_describes_itself(name: str) -> None:
    with open_gguf(DATA / name) as gguf:
        assert gguf.metadata["general.name"] == "ktx-jax tiny"
        assert gguf.metadata["general.license"] == "apache-2.0"
        assert gguf.metadata["tokenizer.ggml.pre"] == "deepseek-llm"
        types = {info.ggml_type.name for info in gguf.tensors.values()}
        assert types == ({"F32", "Q8_0"} if "q8_0" in name else {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"})


def test_prose_is_likely(llm: LLM) -> None:
    ids = llm.encode(PROSE)
    scores = np.asarray(jax.nn.log_softmax(llm.logits(ids)))
    nats = -sum(scores[at, token] for at, token in enumerate(ids[1:]))
    assert nats / len(PROSE) < MOST_NATS_A_CHARACTER


def test_chat_ends_by_itself(llm: LLM) -> None:
    reply = llm.chat([{"role": "user", "content": "Who are you?"}], SamplingParams(max_tokens=80, temperature=0.0))
    assert reply.finish_reason == "stop"
    assert "Python" in reply.text
