# SPDX-License-Identifier: Apache-2.0
"""Perplexity, comparison and verification, of files and from the command line."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from golden_models import golden_llm, token_kl

from ktx_jax.commands.common import ModelOptions, print_json
from ktx_jax.commands.compare import compare as compare_command
from ktx_jax.errors import KtxError
from ktx_jax.evaluate.compare import COLUMNS, Distances, compare, draw_comparison, measure_distances
from ktx_jax.evaluate.identity import model_identity
from ktx_jax.evaluate.journal import Journal
from ktx_jax.evaluate.perplexity import perplexity_run
from ktx_jax.evaluate.verify import check_fast_path, check_perplexity, check_shape
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.gguf.writer import TensorSource, write_gguf
from ktx_jax.llm import LLM
from ktx_jax.presets import SHAPES, preset_config
from ktx_jax.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "ktx_jax" / "data"
Q8, Q4 = DATA / "tiny-q8_0.gguf", DATA / "tiny-q4_k_m.gguf"
TEXT = "\n".join(topics.values())[:6000]
WINDOW = 128


def load(path: Path, **options) -> LLM:
    return LLM(path, **{"context": WINDOW, "batch": 1, "dtype": "float32", "implementation": "xla", **options})


@pytest.fixture(scope="module")
def models() -> tuple[LLM, LLM]:
    return load(Q8), load(Q4)


def whole_logits(llm: LLM, rows: np.ndarray) -> np.ndarray:
    fn, params = llm.functional()
    return np.asarray(jax.jit(jax.vmap(fn, (None, 0)))(params, jnp.asarray(rows)))


def test_compare_gives_the_kl_of_the_exact_logits(models):
    a, b = models
    found = compare(a, b, TEXT, WINDOW, Journal(None, {}))
    ids = np.asarray(a.tokenizer.encode(TEXT), np.int32)
    rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).copy()
    rows[:, 0] = a.tokenizer.bos_id
    exact_a, exact_b = (whole_logits(llm, rows)[:, WINDOW // 2 : -1] for llm in models)
    kl = token_kl(exact_a, exact_b).reshape(-1)
    np.testing.assert_allclose(found.kl, kl, atol=2e-6)
    summary = found.summary()
    assert summary["kl"] == pytest.approx(kl.mean(), abs=1e-6)
    assert summary["same_top"] == (exact_a.argmax(-1) == exact_b.argmax(-1)).mean()
    for side, llm in zip("ab", models, strict=True):
        assert summary[f"perplexity_{side}"] == pytest.approx(llm.perplexity(TEXT, WINDOW).value, rel=1e-5)
    assert summary["log_perplexity_ratio"] == pytest.approx(
        np.log(summary["perplexity_b"] / summary["perplexity_a"]), abs=1e-6
    )


def test_compare_resumes(models, tmp_path):
    path, run = tmp_path / "results.jsonl", {"compare": 1}
    with Journal(path, run) as journal:
        whole = compare(*models, TEXT, WINDOW, journal)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])
    calls = []
    with Journal(path, run, resume=True) as journal:
        again = compare(*models, TEXT, WINDOW, journal, lambda done, total: calls.append(done / total))
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert calls[0] == pytest.approx(3 * calls[1] / 4)  # what is there is no progress of this run
    assert calls[-1] == 1
    assert len(path.read_text().splitlines()) == len(lines)


def test_results_of_other_weights_in_a_file_of_the_same_name_are_refused(models, tmp_path):
    """A model made anew, in another folder: the same name, the same size, the same configuration."""
    changed, path = "blk.3.ffn_down_exps.weight", tmp_path / Q8.name
    with open_gguf(Q8) as gguf:
        tensors = [
            TensorSource(name, t.shape, t.ggml_type, np.roll(gguf.blocks(name), int(name == changed), axis=0))
            for name, t in gguf.tensors.items()
        ]
        write_gguf(path, gguf.metadata, tensors)
    other = load(path)
    Journal(tmp_path / "p.jsonl", perplexity_run(models[0], TEXT, WINDOW, None)).close()
    with pytest.raises(KtxError, match="results of another run: perplexity weights was"):
        Journal(tmp_path / "p.jsonl", perplexity_run(other, TEXT, WINDOW, None), resume=True)
    assert model_identity(models[0]) == model_identity(load(Q8))


def test_compare_refuses_other_vocabularies(models, tmp_path):
    with pytest.raises(KtxError, match="different vocabularies"):
        compare(models[0], golden_llm("lite"), TEXT, WINDOW, Journal(None, {}))


def test_compare_refuses_a_tokenizer_that_differs_late_in_the_text(models, tmp_path):
    path = tmp_path / "other.gguf"
    with open_gguf(Q8) as gguf:
        tensors = [TensorSource(name, t.shape, t.ggml_type, gguf.blocks(name)) for name, t in gguf.tensors.items()]
        tokens = list(gguf.metadata["tokenizer.ggml.tokens"])
        a, b = tokens.index("!"), tokens.index("~")
        tokens[a], tokens[b] = tokens[b], tokens[a]
        write_gguf(path, {**gguf.metadata, "tokenizer.ggml.tokens": tokens}, tensors)
    other = load(path)
    text = "the same words " * 1000
    windows = len(models[0].encode(text)) // WINDOW
    journal = Journal(None, {})
    for at in range(windows + 1):
        journal.add(str(at), [[0.0]] * len(COLUMNS))
    assert len(compare(models[0], other, text, WINDOW, journal).kl) == windows
    with pytest.raises(KtxError, match="different vocabularies"):
        compare(models[0], other, text[:12_000] + "!" * 9 + text[12_000:], WINDOW, journal)


def test_one_token_has_no_error():
    summary = Distances(*np.zeros((4, 1))).summary()
    assert summary["tokens"] == 1
    assert all(np.isnan(value) for name, value in summary.items() if name.endswith("_error"))


def test_what_is_no_number_is_null_in_json(capsys):
    print_json({"error": float("nan"), "rows": [1.5, float("-inf")], "name": "NaN"})
    assert capsys.readouterr().out == '{"error": null, "rows": [1.5, null], "name": "NaN"}\n'


def test_a_plot_that_cannot_be_drawn_is_an_error_before_any_work(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("ktx_jax.commands.compare.load_llms", lambda *a: pytest.fail("models were loaded"))
    options = ModelOptions(Q8)
    for plot, message in ((tmp_path / "a.foo", "should end in .*png"), (tmp_path / "no" / "a.png", "not a folder")):
        with pytest.raises(KtxError, match=message):
            compare_command(options, options, text_file, WINDOW, None, False, plot, False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KtxError, match=re.escape("pip install 'ktx-jax[plot]'")):
        compare_command(options, options, text_file, WINDOW, None, False, tmp_path / "a.png", False)


def test_a_model_is_no_distance_from_itself():
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    distances = measure_distances(logits, logits + 3, np.arange(5, dtype=np.int32))
    np.testing.assert_allclose(distances.kl, 0, atol=1e-6)
    assert distances.same_top.all()
    np.testing.assert_allclose(distances.logprob_a, distances.logprob_b, atol=1e-5)


def test_drawing(tmp_path):
    rng = np.random.default_rng(0)
    distances = Distances(rng.exponential(size=50), np.ones(50), -rng.exponential(size=50), -rng.exponential(size=50))
    draw_comparison(distances, ("a", "b"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KtxError, match="cannot be written"):
        draw_comparison(distances, ("a", "b"), tmp_path / "missing" / "figure.png")


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_pass(name):
    shape, check = check_shape(preset_config(name))
    assert check.passed
    assert SHAPES[name].name in check.found
    assert (shape == "v2-lite") == (name == "v2-lite")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"routed_scaling_factor": 1.0},
            "routed_scaling_factor is 1.0; DeepSeek-V2.5, the nearest known model, has 16.0",
        ),
        ({"n_group": 1, "topk_group": 1}, r"n_group is 1; .* has 8 \(1 more differ\)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    ],
)
def test_the_first_thing_that_differs_is_named(changes, found):
    shape, check = check_shape(dataclasses.replace(preset_config("v2.5"), **changes))
    assert shape is None
    assert check.passed is False
    assert re.search(found, check.found)


@pytest.mark.parametrize(
    ("shape", "value", "passed"),
    [("v2-lite", 6.77, True), ("v2-lite", 6.90, False), ("v2.5", 6.76, None), (None, 6.76, None)],
)
def test_perplexity_is_held_against_the_published_one(shape, value, passed):
    wikitext = " \n = Robert Boulter = \n" + "word " * 258_000
    assert check_perplexity(shape, Q8, wikitext, value, "").passed is passed
    assert check_perplexity(shape, Q8, wikitext[:1000], value, "").passed is None


def test_types_without_a_published_figure_lie_between_the_others(tmp_path):
    path = tmp_path / "q4_k.gguf"
    blocks = TensorSource("output.weight", (2, 256), T.Q4_K, np.zeros((2, 1, 144), np.uint8))
    write_gguf(path, {"general.architecture": "deepseek2", "general.name": "DeepSeek-V2-Lite"}, [blocks])
    wikitext = " \n = Robert Boulter = \n" + "word " * 258_000
    assert [check_perplexity("v2-lite", path, wikitext, value, "").passed for value in (6.83, 7.2, 6.5)] == [
        True, False, False,
    ]  # fmt: skip


def test_a_fast_path_that_is_off_fails():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 50)).astype(np.float32) * 3
    tokens = rng.integers(0, 50, 64).tolist()
    assert check_fast_path(exact, exact + 1e-3, tokens, "").passed
    noise = rng.standard_normal(exact.shape).astype(np.float32)
    assert not check_fast_path(exact, exact + noise, tokens, "").passed


def ktx(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ktx_jax.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.slow
def test_commands(text_file, tmp_path):
    said = ktx("perplexity", Q8, text_file, "--window", WINDOW, "--json", "--out", tmp_path / "p.jsonl")
    assert said.returncode == 0, said.stderr
    perplexity = json.loads(said.stdout)
    windows = len(load_tokens(TEXT)) // WINDOW
    assert perplexity["tokens"] == windows * (WINDOW // 2 - 1)
    again = ktx("perplexity", Q8, text_file, "--window", WINDOW, "--out", tmp_path / "p.jsonl")
    assert (again.returncode, "--resume goes on" in again.stderr) == (1, True)
    resumed = ktx("perplexity", Q8, text_file, "--window", WINDOW, "--json", "--out", tmp_path / "p.jsonl", "--resume")
    assert json.loads(resumed.stdout) == perplexity
    said = ktx("compare", Q8, Q4, text_file, "--window", WINDOW, "--plot", tmp_path / "c.png")
    assert said.returncode == 0, said.stderr
    assert "KL from A to B" in said.stdout
    assert (tmp_path / "c.png").stat().st_size > 10_000
    said = ktx("verify", Q8)
    assert said.returncode == 1
    assert "FAIL  shape       vocab_size is 1920" in said.stdout
    assert "pass  fast path" in said.stdout
    assert said.stdout.endswith("differs first in: shape\n")


def load_tokens(text: str) -> list[int]:
    return Tokenizer.from_gguf(Q8).encode(text)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_the_same(text_file, tmp_path):
    arguments = ("perplexity", Q8, text_file, "--window", WINDOW, "--stride", 32, "--json")
    whole = ktx(*arguments, "--out", tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    kept, rng = tmp_path / "killed.jsonl", random.Random(1)
    for _ in range(int(os.environ.get("KTX_KILLS", "4"))):
        before = len(kept.read_text().splitlines()) if kept.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "ktx_jax.cli", *map(str, arguments), "--out", str(kept), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        more = before + rng.randint(0, 6)
        while process.poll() is None and not (kept.exists() and len(kept.read_text().splitlines()) >= more):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.wait()
    resumed = ktx(*arguments, "--out", kept, "--resume")
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
    assert sorted(kept.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())
