# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model on the documentation that this Python carries, and writes it as two GGUF files.

    python examples/train_tiny.py                    # train, then write ktx_jax/data/tiny-*.gguf
    python examples/train_tiny.py --export-only      # write the files again from the last checkpoint

Everything is seeded: the same Python, JAX and machine give the same model.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from tiny_data import batches, load_texts, pack, tokenize
from tiny_export import export
from tiny_model import CONFIG, Params, abstract_model, batch_logits, initial_params
from tiny_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
BOS_ID = 0
LEARNING_RATE, ADAM_LEARNING_RATE = 6e-3, 3e-3
WARMUP, FINAL_FRACTION = 100, 0.03
EVAL_EVERY = 250


@dataclass(frozen=True)
class Phase:
    """A stretch of training with rows of one length."""

    length: int
    rows: int
    steps: int


# Short rows first: attention is a good part of the cost. Long ones last, for conversations and whole pages.
PHASES = (Phase(length=256, rows=8, steps=4000), Phase(length=1024, rows=2, steps=300))


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon (momentum, orthogonalized) for the matrices, Adam for embeddings, router and norms; cosine decay."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, WARMUP, steps, peak * FINAL_FRACTION)

    def dimensions(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
        if x.ndim < 2 or path[0].key.endswith(("embed_tokens", "mlp.gate")):
            return None
        return MuonDimensionNumbers(reduction_axis=x.ndim - 1, output_axis=x.ndim - 2)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(LEARNING_RATE),
            adam_learning_rate=schedule(ADAM_LEARNING_RATE),
            adam_b2=0.95,
            weight_decay=0.05,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(dimensions, params),
        ),
    )


class Trainer:
    """Parameters, optimizer state and the jitted steps that change them."""

    def __init__(self) -> None:
        graphdef, state = abstract_model()
        self.params = initial_params(state, SEED)
        rule = optimizer(sum(phase.steps for phase in PHASES))
        self.state = rule.init(self.params)

        def loss(params: Params, rows: jax.Array) -> jax.Array:
            logits = batch_logits(graphdef, state, params, rows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:].reshape(-1)).mean()

        def step(params: Params, state: optax.OptState, rows: jax.Array) -> tuple:
            value, gradient = jax.value_and_grad(loss)(params, rows)
            updates, state = rule.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self._loss, self._step = jax.jit(loss), jax.jit(step, donate_argnums=(0, 1))

    def step(self, rows: np.ndarray) -> float:
        """One update; the loss before it, in nats a token."""
        self.params, self.state, value = self._step(self.params, self.state, jnp.asarray(rows))
        return float(value)

    def evaluate(self, rows: np.ndarray, size: int) -> float:
        """Mean loss over rows, `size` at a time."""
        parts = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
        return float(np.mean([self._loss(self.params, jnp.asarray(part)) for part in parts]))


def train(train_documents: list[np.ndarray], held_out: list[np.ndarray], checkpoint: Path) -> tuple[Params, list]:
    """Runs all phases. Returns the parameters and a log of (step, seconds, training loss, held-out loss)."""
    trainer, log, done, recent = Trainer(), [], 0, []
    begun = time.perf_counter()
    for number, phase in enumerate(PHASES):
        feed = batches(train_documents, phase.length + 1, phase.rows, BOS_ID, SEED + number)
        held_rows = pack(held_out, phase.length + 1, np.random.default_rng(SEED), BOS_ID)
        for index, rows in zip(range(phase.steps), feed, strict=False):
            recent.append(trainer.step(rows))
            done += 1
            if done % EVAL_EVERY == 0 or index + 1 == phase.steps:
                held_loss = trainer.evaluate(held_rows, phase.rows)
                entry = (done, time.perf_counter() - begun, float(np.mean(recent)), held_loss)
                print("step {} · {:.0f} s · loss {:.3f} · held out {:.3f}".format(*entry), flush=True)
                log.append(entry)
                recent.clear()
                np.savez(checkpoint, **trainer.params)
    return trainer.params, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "ktx_jax" / "data", help="where the GGUF files go")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny", help="where the checkpoint and log go")
    parser.add_argument("--export-only", action="store_true", help="write the files from the last checkpoint")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "params.npz"

    texts, held_texts = load_texts(SEED)
    tokenizer = train_tokenizer(texts, CONFIG.vocab_size)
    if not arguments.export_only:
        documents, held_out = tokenize(tokenizer, texts), tokenize(tokenizer, held_texts)
        print(f"{sum(map(len, documents)):,} tokens to train on, {sum(map(len, held_out)):,} held out", flush=True)
        _, log = train(documents, held_out, checkpoint)
        (arguments.work / "log.json").write_text(json.dumps(log))
    with np.load(checkpoint) as saved:
        export(dict(saved), tokenizer, arguments.out)


if __name__ == "__main__":
    main()
