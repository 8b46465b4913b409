# SPDX-License-Identifier: Apache-2.0
"""A batch evaluation as a plain jitted script: the loss of a text by position, over batches of windows.

    python examples/batch_eval.py [--model FILE] [--text FILE] [--out FIGURE]

`LLM.perplexity` and `LLM.score` are faster (they pack and keep a cache); this shows how to write one's own.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ktx_jax import LLM
from ktx_jax.resources import demo_model

LENGTH, BATCH = 128, 4


def windows(llm: LLM, text: str) -> np.ndarray:
    """The text as rows of `LENGTH` tokens, whole batches of them."""
    ids = np.asarray(llm.encode(text), np.int32)
    count = len(ids) // LENGTH // BATCH * BATCH
    if not count:
        raise SystemExit(f"the text has {len(ids)} tokens; a batch is {BATCH} windows of {LENGTH}: give a longer one")
    return ids[: count * LENGTH].reshape(-1, BATCH, LENGTH)


def evaluate(llm: LLM, text: str) -> np.ndarray:
    """Negative log-likelihood (nats) of every token but each window's first: [windows, LENGTH - 1]."""
    model, params = llm.functional()

    @jax.jit
    def nats(params, rows):
        logits = jax.vmap(model, in_axes=(None, 0))(params, rows)[:, :-1]  # [B, T - 1, V]
        logprobs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=-1)[..., 0]

    return np.concatenate([np.asarray(nats(params, rows)) for rows in windows(llm, text)])


def draw(nats: np.ndarray, path: Path) -> None:
    """Mean loss by position in the window: what context is worth."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, LENGTH), nats.mean(axis=0), linewidth=0.6, alpha=0.6, label="each position")
    smooth = [nats[:, max(at - 8, 0) : at + 8].mean() for at in range(LENGTH - 1)]
    axes.plot(np.arange(1, LENGTH), smooth, label="mean of 16")
    axes.set(xlabel="tokens of context", ylabel="nats a token", title=f"{len(nats)} windows")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> float:
    """Prints and returns the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), help="a GGUF file [default: the embedded model]")
    parser.add_argument("--text", type=Path, help="a text file [default: Python's help topics]")
    parser.add_argument("--out", type=Path, default=Path("batch_eval.png"), help="the figure")
    options = parser.parse_args(arguments)
    text = options.text.read_text("utf-8") if options.text else "\n".join(topics.values())[:30_000]
    llm = LLM(options.model, implementation="xla", dtype="float32", context=LENGTH, batch=1)
    nats = evaluate(llm, text)
    draw(nats, options.out)
    perplexity = float(np.exp(nats.mean()))
    print(f"perplexity {perplexity:.3f} over {nats.size} tokens; {options.out}")
    return perplexity


if __name__ == "__main__":
    main()
