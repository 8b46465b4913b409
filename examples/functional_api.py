# SPDX-License-Identifier: Apache-2.0
"""The model as a pure function: jit, vmap, gradients with respect to activations, and a soft prompt.

    python examples/functional_api.py [--model FILE] [--out FIGURE]

1. Which tokens, at which layer, does the next token depend on? The gradient of its log-probability with respect to the
   outputs of all layers, in one backward pass.
2. A soft prompt: vectors added to the first embeddings are trained until the model says a sentence after them.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ktx_jax import LLM
from ktx_jax.resources import demo_model

CONTEXT, TARGET = "If the object has no such attribute, an AttributeError is", " raised"
WISH = " The module threading is not a banana."
SOFT_TOKENS, STEPS, RATE = 8, 60, 0.05


def influence(llm: LLM) -> tuple[np.ndarray, list[str]]:
    """Norm of the gradient of log p(TARGET | CONTEXT) by layer and token, each layer's largest 1: [layers, tokens]."""
    model, params = llm.functional()
    tokens = jnp.asarray(llm.encode(CONTEXT))
    target = llm.tokenizer.encode(TARGET, False)[0]
    names = [f"model.layers.{i}" for i in range(llm.config.num_hidden_layers)]

    @jax.jit
    @jax.grad
    def gradient(added):
        return jax.nn.log_softmax(model(params, tokens, added)[-1])[target]

    zeros = {name: jnp.zeros((len(tokens), llm.config.hidden_size)) for name in names}
    slopes = gradient(zeros)
    norms = np.stack([np.linalg.norm(slopes[name], axis=-1) for name in names])
    return norms / norms.max(axis=1, keepdims=True), [llm.tokenizer.decode([int(token)]) for token in tokens]


def soft_prompt(llm: LLM, steps: int) -> np.ndarray:
    """Trains vectors on the places of `SOFT_TOKENS` tokens so that WISH follows; its nats a token by step."""
    model, params = llm.functional()
    begin = llm.encode("")[:1]
    wish = llm.tokenizer.encode(WISH, False)
    tokens = jnp.asarray([*begin, *[wish[0]] * SOFT_TOKENS, *wish])
    head, rest = len(begin), len(tokens) - len(begin) - SOFT_TOKENS

    def loss(soft):
        added = jnp.pad(soft, ((head, rest), (0, 0)))  # nothing is added outside the soft prompt
        logprobs = jax.nn.log_softmax(model(params, tokens, {"model.embed_tokens": added}))
        return -logprobs[jnp.arange(len(tokens) - rest - 1, len(tokens) - 1), tokens[-rest:]].mean()

    @jax.jit
    def step(soft, mean, square, i):  # Adam
        value, slope = jax.value_and_grad(loss)(soft)
        mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
        scaled = mean / (1 - 0.9**i) / (jnp.sqrt(square / (1 - 0.99**i)) + 1e-8)
        return soft - RATE * scaled, mean, square, value

    soft = mean = square = jnp.zeros((SOFT_TOKENS, llm.config.hidden_size))
    losses = []
    for i in range(1, steps + 1):
        soft, mean, square, value = step(soft, mean, square, i)
        losses.append(float(value))
    return np.asarray(losses)


def many(llm: LLM) -> np.ndarray:
    """The log-probabilities of the next token after many prompts of one length, by `jax.vmap`: [prompts, V]."""
    model, params = llm.functional()
    prompts = jnp.asarray([llm.encode(CONTEXT)[-8:], llm.encode(WISH)[-8:]])
    return np.asarray(jax.jit(jax.vmap(lambda row: jax.nn.log_softmax(model(params, row)[-1])))(prompts))


def draw(norms: np.ndarray, words: list[str], losses: np.ndarray, path: Path) -> None:
    """Both experiments side by side."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = left.imshow(norms, aspect="auto", cmap="magma", origin="lower")
    left.set_xticks(range(len(words)), [repr(word)[1:-1] for word in words], rotation=60, ha="right")
    left.set(ylabel="layer", title=f"what {TARGET!r} depends on", yticks=range(len(norms)))
    figure.colorbar(shown, ax=left, label="gradient, of the layer's largest")
    right.plot(losses)
    right.set(xlabel="step", ylabel="nats a token", title=f"a soft prompt for\n{WISH!r}")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Prints what came out; returns the soft prompt's losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), help="a GGUF file [default: the embedded model]")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the soft prompt's training")
    parser.add_argument("--out", type=Path, default=Path("functional_api.png"), help="the figure")
    options = parser.parse_args(arguments)
    llm = LLM(options.model, implementation="xla", dtype="float32", context=128, batch=1)
    print("likeliest next tokens:", [llm.tokenizer.decode([int(row.argmax())]) for row in many(llm)])
    norms, words = influence(llm)
    losses = soft_prompt(llm, options.steps)
    draw(norms, words, losses, options.out)
    print(f"soft prompt: from {losses[0]:.2f} to {losses[-1]:.2f} nats a token; {options.out}")
    return losses


if __name__ == "__main__":
    main()
