# SPDX-License-Identifier: Apache-2.0
"""Which experts fire on a text, by layer: a heat map.

python examples/expert_statistics.py [--model FILE] [--text FILE] [--out FIGURE]
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

LENGTH = 256


def expert_shares(llm: LLM, text: str) -> np.ndarray:
    """The share of tokens that choose each expert: [MoE layers, experts]; a row adds up to the experts a token uses."""
    model, params = llm.functional(capture=["model.layers.*.mlp.gate"])
    experts = llm.config.n_routed_experts

    @jax.jit
    def counts(params, tokens):
        _, seen = model(params, tokens)
        layers = sorted(seen, key=lambda path: int(path.split(".")[2]))
        return jnp.stack([jax.nn.one_hot(seen[layer][0], experts).sum((0, 1)) for layer in layers])

    ids = np.asarray(llm.encode(text), np.int32)
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if not rows.size:
        raise SystemExit(f"the text has {len(ids)} tokens; a window is {LENGTH}: give a longer one")
    return sum(np.asarray(counts(params, row)) for row in rows) / rows.size


def draw(shares: np.ndarray, llm: LLM, path: Path) -> None:
    """The shares, relative to even use."""
    even = llm.config.num_experts_per_tok / shares.shape[1]
    figure = Figure(figsize=(max(5, shares.shape[1] / 10), max(3, len(shares) / 4)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares / even, aspect="auto", cmap="viridis", origin="lower", vmin=0)
    first = llm.config.num_hidden_layers - len(shares)
    axes.set_yticks(range(len(shares)), [str(first + i) for i in range(len(shares))])
    axes.set(xlabel="expert", ylabel="layer", title=f"{llm.path.name}: use of experts")
    figure.colorbar(shown, ax=axes, label="of even use")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Prints the most and least used experts of each layer; returns the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), help="a GGUF file [default: the embedded model]")
    parser.add_argument("--text", type=Path, help="a text file [default: Python's help topics]")
    parser.add_argument("--out", type=Path, default=Path("expert_statistics.png"), help="the figure")
    options = parser.parse_args(arguments)
    text = options.text.read_text("utf-8") if options.text else "\n".join(topics.values())[:30_000]
    llm = LLM(options.model, implementation="xla", dtype="float32", context=LENGTH, batch=1)
    shares = expert_shares(llm, text)
    draw(shares, llm, options.out)
    for layer, row in enumerate(shares, llm.config.num_hidden_layers - len(shares)):
        print(f"layer {layer}: most {row.argmax()} ({row.max():.1%} of tokens), least {row.argmin()} ({row.min():.1%})")
    print(options.out)
    return shares


if __name__ == "__main__":
    main()
