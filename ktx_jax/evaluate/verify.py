# SPDX-License-Identifier: Apache-2.0
"""Is this the published model, and is it computed right? What to run first on real weights."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from ktx_jax.evaluate.compare import measure_distances
from ktx_jax.evaluate.journal import Journal
from ktx_jax.evaluate.perplexity import Advance, measure_perplexity
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.llm import LLM, load_config
from ktx_jax.model.config import Config
from ktx_jax.presets import SHAPES, preset_config

WINDOW = 512
# The two models that are loaded, one after another, by the options in which they are not the user's.
AS_IT_RUNS: dict[str, Any] = {"context": WINDOW, "batch": 1}
EXACT: dict[str, Any] = {**AS_IT_RUNS, "implementation": "xla", "dtype": "float32"}
# Perplexity of DeepSeek-V2-Lite on wikitext-2's test part, windows of 512, by the type of most weights.
PUBLISHED = {
    "F16": 6.761, "BF16": 6.761, "Q8_0": 6.760, "Q6_K": 6.778, "Q5_0": 6.816, "IQ4_XS": 6.883, "Q4_0": 6.968,
}  # fmt: skip
_AGREE = 0.005  # of the published figure: other builds of the same type differ by less
_MOST_KL, _LEAST_SAME = 0.01, 0.95  # of the fast path against the exact one
_LAYOUT = {"k_b_transposed"}  # of the file, not of the model
_WIKITEXT = ("= Robert Boulter =", 1_200_000, 1_400_000)  # how wikitext-2's test part begins, and its characters


@dataclass(frozen=True)
class Check:
    """One line of the page: what was looked at, whether it is right (None: it could not be judged), and what was
    found."""

    name: str
    passed: bool | None
    found: str


def verify(load: Callable[..., LLM], path: Path, text: str | None, advance: Advance | None = None) -> Iterator[Check]:
    """The checks, each as soon as it is done. One model is in memory at a time.

    Args:
      load: makes the `LLM`, of the options it is given and the user's others.
      text: to take the perplexity of; None for a few pages on Python that every installation has.
    """
    config = load_config(path)
    name, shape = check_shape(config)
    yield shape
    llm = load(**AS_IT_RUNS)
    yield check_types(path)
    built_in = "\n".join(topics[topic] for topic in sorted(topics))[:40_000]
    with Journal(None, {}) as journal:
        perplexity = measure_perplexity(llm, text or built_in, WINDOW, None, journal, advance)
    found = f"{perplexity.value:.3f} ± {perplexity.error:.3f} over {perplexity.tokens} tokens"
    yield check_perplexity(name, path, text, perplexity.value, found)
    tokens = llm.encode(text or built_in)[:WINDOW]
    fast, described = llm.logits(tokens), f"{llm.implementation}, {llm.dtype.__name__}"
    llm.close()
    del llm
    exact = load(**EXACT).logits(tokens)
    yield check_fast_path(exact, fast, tokens, described)


def check_shape(config: Config) -> tuple[str | None, Check]:
    """The published shape that the configuration has, or the first thing in which it differs from the nearest."""
    presets = {name: preset_config(name) for name in SHAPES}

    def different(name: str) -> list[str]:
        fields = [f.name for f in dataclasses.fields(Config) if f.name not in _LAYOUT]
        return [field for field in fields if not _same(getattr(config, field), getattr(presets[name], field))]

    nearest = min(presets, key=lambda name: len(different(name)))
    if not (wrong := different(nearest)):
        names = " / ".join(SHAPES[name].name for name in presets if not different(name))
        return nearest, Check("shape", True, names)
    field = wrong[0]
    here, there = getattr(config, field), getattr(presets[nearest], field)
    found = f"{field} is {here}; {SHAPES[nearest].name}, the nearest known model, has {there}"
    return None, Check("shape", False, found + (f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""))


def _same(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3)
    return a == b


def check_types(path: Path) -> Check:
    """Types by bytes, for the reader to compare with the file's name."""
    with open_gguf(path) as gguf:
        counted: Counter[str] = Counter()
        for tensor in gguf.tensors.values():
            counted[tensor.ggml_type.name] += tensor.nbytes
    total = sum(counted.values())
    shares = ", ".join(f"{kind} {size / total:.0%}" for kind, size in counted.most_common() if size > 0.005 * total)
    return Check("types", None, f"{total / 1e9:.2f} GB: {shares}")


def check_perplexity(shape: str | None, path: Path, text: str | None, value: float, found: str) -> Check:
    """The perplexity against the published one, where there is one."""
    opening, least, most = _WIKITEXT
    if text is None:
        return Check("perplexity", None, f"{found} of built-in text; --text wikitext-2's test part to compare")
    if not (opening in text[:100] and least < len(text) < most):
        return Check("perplexity", None, f"{found}; published figures are of wikitext-2's test part")
    with open_gguf(path) as gguf:
        kinds: Counter[str] = Counter()
        for tensor in gguf.tensors.values():
            kinds[tensor.ggml_type.name] += tensor.nbytes
        chat = "chat" in str(gguf.metadata.get("general.name", "")).lower()
    [(kind, _)] = kinds.most_common(1)
    if shape != "v2-lite" or chat:
        return Check("perplexity", None, f"{found} of wikitext-2; published figures are of the base V2-Lite")
    if kind in PUBLISHED:
        fine = abs(value / PUBLISHED[kind] - 1) < _AGREE
        return Check("perplexity", fine, f"{found} of wikitext-2; published for {kind}: {PUBLISHED[kind]}")
    low, high = min(PUBLISHED.values()) * (1 - _AGREE), max(PUBLISHED.values()) * (1 + _AGREE)
    known = f"none published for {kind}, {min(PUBLISHED.values())} to {max(PUBLISHED.values())} for others"
    return Check("perplexity", low < value < high, f"{found} of wikitext-2; {known}")


def check_fast_path(exact: np.ndarray, fast: np.ndarray, tokens: list[int], described: str) -> Check:
    """The logits of the model as it runs by default, against the exact ones."""
    summary = measure_distances(exact[:-1], fast[:-1], np.asarray(tokens[1:], np.int32)).summary()
    fine = summary["kl"] < _MOST_KL and summary["same_top"] > _LEAST_SAME
    found = (
        f"{described} against xla, float32, over {len(tokens)} tokens: KL {summary['kl']:.2e} nats "
        f"(at most {_MOST_KL:g}), the same token first in {summary['same_top']:.1%} (at least {_LEAST_SAME:.0%})"
    )
    return Check("fast path", fine, found)
