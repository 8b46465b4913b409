# SPDX-License-Identifier: Apache-2.0
"""The examples run on the embedded model, say something true, and draw."""

import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import batch_eval  # noqa: E402
import expert_statistics  # noqa: E402
import functional_api  # noqa: E402
import sharding_experiment  # noqa: E402

from ktx_jax.llm import LLM  # noqa: E402
from ktx_jax.resources import demo_model  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(topics.values())[:4000])
    return path


def test_batch_eval_is_a_plain_short_script(text, tmp_path):
    assert len((ROOT / "examples" / "batch_eval.py").read_text().splitlines()) < 80
    perplexity = batch_eval.main(["--text", str(text), "--out", str(tmp_path / "figure.png")])
    llm = LLM(demo_model(), implementation="xla", dtype="float32", context=128, batch=1)
    rows = batch_eval.windows(llm, text.read_text()).reshape(-1, batch_eval.LENGTH)
    scores = llm.score([(row[:1].tolist(), row[1:].tolist()) for row in rows])
    nats = -np.mean([score.logprob / len(score.logprobs) for score in scores])
    assert perplexity == pytest.approx(np.exp(nats), rel=1e-4)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("example", [batch_eval, expert_statistics])
def test_a_text_that_is_too_short_says_so(example, tmp_path):
    (tmp_path / "short.txt").write_text("The")
    with pytest.raises(SystemExit, match=r"the text has 2 tokens; .* give a longer one"):
        example.main(["--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "figure.png")])


def test_a_soft_prompt_is_learned(tmp_path):
    losses = functional_api.main(["--steps", "12", "--out", str(tmp_path / "figure.png")])
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_expert_statistics(text, tmp_path):
    shares = expert_statistics.main(["--text", str(text), "--out", str(tmp_path / "figure.png")])
    llm = LLM(demo_model(), implementation="xla", dtype="float32", context=64, batch=1)
    config = llm.config
    assert shares.shape == (config.num_hidden_layers - config.first_k_dense_replace, config.n_routed_experts)
    np.testing.assert_allclose(shares.sum(axis=1), config.num_experts_per_tok, rtol=1e-5)
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_sharding_experiment(tmp_path):
    """In a process of its own: how many devices there are is settled when JAX starts."""
    script = ROOT / "examples" / "sharding_experiment.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "figure.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, *lines, _ = done.stdout.splitlines()
    assert len(lines) == len(sharding_experiment.TINY)
    named = {name: line.removeprefix(name).split() for name, line in zip(sharding_experiment.TINY, lines, strict=True)}
    devices, weights, weights_unit, cache, cache_unit, collectives = zip(
        *(row[:6] for row in named.values()), strict=True
    )
    assert devices == ("1", "2", "4", "4", "4", "2")
    assert set(weights_unit) == {"MB"}
    assert set(cache_unit) == {"kB"}
    held, cached = [list(map(float, column)) for column in (weights, cache)]
    assert held[0] == held[4] > held[2] > held[1] > held[3]  # whole, whole, experts cut, all but the latent cut, both
    assert cached[4] == pytest.approx(cached[0] / 4, rel=1e-3)
    assert [int(count) > 0 for count in collectives] == [False, True, True, True, False, False]
    kl = [float(row[-2]) for row in named.values()]
    assert kl[0] == 0
    assert max(kl) < 0.01  # bfloat16's rounding, in another order
    assert all(float(row[-1]) > 0 for row in named.values())
    assert (tmp_path / "figure.png").stat().st_size > 10_000
