# SPDX-License-Identifier: Apache-2.0
"""What it costs to replace one model by another: how far the second's next-token distributions are from the first's."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ktx_jax.engine.branches import Window
from ktx_jax.engine.windows import Perplexity, perplexity_windows
from ktx_jax.errors import KtxError
from ktx_jax.evaluate.identity import digest, model_identity
from ktx_jax.evaluate.journal import Journal
from ktx_jax.evaluate.perplexity import Advance
from ktx_jax.llm import LLM

COLUMNS = ("kl", "same_top", "logprob_a", "logprob_b")
_PERCENTILES = (50, 90, 99, 99.9, 100)


@dataclass(frozen=True, eq=False)
class Distances:
    """For each scored token, how B's distribution of it differs from A's.

    Attributes:
      kl: nats from A's distribution to B's.
      same_top: 1 where both find the same token most likely, else 0.
      logprob_a, logprob_b: of the token that is there, in nats.
    """

    kl: Float[np.ndarray, " n"]
    same_top: Float[np.ndarray, " n"]
    logprob_a: Float[np.ndarray, " n"]
    logprob_b: Float[np.ndarray, " n"]

    def summary(self) -> dict[str, int | float]:
        """The figures of a comparison; `*_error` are standard errors, taking tokens for independent."""
        a, b = (Perplexity.of([logprobs]) for logprobs in (self.logprob_a, self.logprob_b))
        ratio, ratio_error = _mean(self.logprob_a - self.logprob_b)
        kl, kl_error = _mean(self.kl)
        same, same_error = _mean(self.same_top)
        moved = np.exp(self.logprob_b) - np.exp(self.logprob_a)
        named = zip(_PERCENTILES, np.percentile(self.kl, _PERCENTILES), strict=True)
        return {
            "tokens": a.tokens,
            "perplexity_a": a.value,
            "perplexity_a_error": a.error,
            "perplexity_b": b.value,
            "perplexity_b_error": b.error,
            "log_perplexity_ratio": ratio,
            "log_perplexity_ratio_error": ratio_error,
            "kl": kl,
            "kl_error": kl_error,
            **{f"kl_p{percent:g}": float(value) for percent, value in named},
            "same_top": same,
            "same_top_error": same_error,
            "probability_rms": math.sqrt(float(np.mean(moved**2))),
        }


def _mean(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def compare_run(a: LLM, b: LLM, text: str, window: int) -> Mapping[str, Any]:
    """What a comparison depends on, for its `Journal`."""
    return {"compare": [model_identity(a), model_identity(b)], "text": digest(text), "window": window}


def compare(a: LLM, b: LLM, text: str, window: int, journal: Journal, advance: Advance | None = None) -> Distances:
    """Both models' distributions over the second halves of windows side by side, as for a perplexity; each window kept
    in the journal when it is done, and those that are there left out.

    Raises:
      KtxError: the models' vocabularies differ, or the text is shorter than a window.
    """
    windows, of_b = (perplexity_windows(model.tokenizer, text, window, None) for model in (a, b))
    same = all(np.array_equal(one.tokens, other.tokens) for one, other in zip(windows, of_b, strict=False))
    if not same or len(windows) != len(of_b) or a.config.vocab_size != b.config.vocab_size:
        raise KtxError(f"{a.path.name} and {b.path.name} have different vocabularies: their tokens cannot be compared")
    advance = advance or (lambda done, total: None)
    left = [at for at in range(len(windows)) if str(at) not in journal]
    total = sum(one.length for one in windows)
    done = total - sum(windows[at].length for at in left)
    advance(done, total)
    for at in left:
        distances = window_distances(a, b, windows[at])
        journal.add(str(at), [getattr(distances, name).tolist() for name in COLUMNS])
        done += windows[at].length
        advance(done, total)
    rows = [np.asarray(journal[str(at)], np.float64) for at in range(len(windows))]
    return Distances(*np.concatenate(rows, axis=1))


def window_distances(a: LLM, b: LLM, window: Window) -> Distances:
    """The distances of a window's scored tokens."""
    tokens, start = window.tokens.tolist(), window.start
    logits_a, logits_b = (model.logits(tokens[:-1])[start - 1 :] for model in (a, b))
    return measure_distances(logits_a, logits_b, window.tokens[start:])


def measure_distances(
    a: Float[np.ndarray, "T V"], b: Float[np.ndarray, "T V"], targets: Int[np.ndarray, " T"]
) -> Distances:
    """The distances of B's logits from A's, and how likely both find the targets."""
    columns = _distances(jnp.asarray(a), jnp.asarray(b), jnp.asarray(targets))
    return Distances(*(np.asarray(column, np.float64) for column in columns))


@jax.jit
def _distances(a: Float[Array, "T V"], b: Float[Array, "T V"], targets: Int[Array, " T"]) -> tuple[jax.Array, ...]:
    log_a, log_b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    kl = (jnp.exp(log_a) * (log_a - log_b)).sum(axis=-1)
    same = a.argmax(axis=-1) == b.argmax(axis=-1)
    return kl, same, *(jnp.take_along_axis(log, targets[:, None], axis=-1)[:, 0] for log in (log_a, log_b))


def blank_figure(path: Path) -> Any:
    """A figure to be drawn in `path`; what stands against that is said before hours of work.

    Raises:
      KtxError: matplotlib (extra `plot`) is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KtxError("plots need matplotlib: pip install 'ktx-jax[plot]'") from error
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    kinds = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise KtxError(f"{path}: the plot cannot be written: its name should end in .{', .'.join(sorted(kinds))}")
    if not os.access(path.parent, os.W_OK):
        raise KtxError(f"{path}: the plot cannot be written: {path.parent} is not a folder that can be written to")
    return figure


def draw_comparison(distances: Distances, names: Iterable[str], path: Path) -> None:
    """Draws how KL is distributed, and the probabilities of the text's tokens under both models.

    Raises:
      KtxError: as `blank_figure`.
    """
    figure = blank_figure(path)
    name_a, name_b = names
    left, right = figure.subplots(1, 2)
    kl = np.sort(np.maximum(distances.kl, 1e-9))
    left.plot(kl, 1 - np.arange(len(kl)) / len(kl))
    left.axvline(distances.kl.mean(), color="tab:red", linewidth=1, label=f"mean {distances.kl.mean():.2e}")
    left.set(xscale="log", yscale="log", xlabel="KL of a token (nats)", ylabel="share of tokens above")
    left.legend()
    shown = right.hexbin(
        np.exp(distances.logprob_a), np.exp(distances.logprob_b), gridsize=40, bins="log", mincnt=1, cmap="viridis"
    )
    figure.colorbar(shown, ax=right, label="tokens")
    right.plot([0, 1], [0, 1], color="tab:red", linewidth=1)
    right.set(xlabel=f"probability under {name_a}", ylabel=f"probability under {name_b}", aspect="equal")
    figure.suptitle(f"{name_a} (A) and {name_b} (B): {len(kl)} tokens")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise KtxError(f"{path}: the plot cannot be written: {error}") from error
