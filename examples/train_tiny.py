# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model on the documentation that this Python carries, and writes it as two GGUF files.

    python examples/train_tiny.py                    # train, then write ktx_jax/data/tiny-*.gguf
    python examples/train_tiny.py --export-only      # write the files again from the last checkpoint

Everything is seeded: the same Python, JAX and machine give the same model.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from tiny_data import batches, load_texts, pack, tokenize
from tiny_export import export
from tiny_model import CONFIG, Params, abstract_model, batch_loss, held_out_loss, initial_params, with_params
from tiny_tokenizer import train_tokenizer

from ktx_jax.gguf.reader import open_gguf
from ktx_jax.model.config import config_from_gguf
from ktx_jax.sharding.auto import Sizes
from ktx_jax.sharding.load import Implementations, load_model
from ktx_jax.sharding.mesh import bind
from ktx_jax.sharding.run import plan_run

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
BOS_ID = 0
LEARNING_RATE, ADAM_LEARNING_RATE = 6e-3, 3e-3
WARMUP, FINAL_FRACTION = 100, 0.03
EVAL_EVERY = 200


# Rows are mostly short, since attention is a good part of the cost; two steps in eight read longer ones.
LENGTHS = (256, 256, 256, 256, 256, 256, 512, 1024)
TOKENS_A_STEP = 2048
STEPS = 3600


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
            weight_decay=0.15,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(dimensions, params),
        ),
    )


class Trainer:
    """Parameters, optimizer state and the jitted steps that change them."""

    def __init__(self) -> None:
        graphdef, state = abstract_model()
        self.params = initial_params(state, SEED)
        rule = optimizer(STEPS)
        self.state = rule.init(self.params)

        def loss(params: Params, rows: jax.Array) -> jax.Array:
            return batch_loss(graphdef, with_params(state, params), rows)

        def step(params: Params, state: optax.OptState, rows: jax.Array) -> tuple:
            value, gradient = jax.value_and_grad(loss)(params, rows)
            updates, state = rule.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.loss, self._step = jax.jit(loss), jax.jit(step, donate_argnums=(0, 1))

    def step(self, rows: np.ndarray) -> float:
        """One update; the loss before it, in nats a token."""
        self.params, self.state, value = self._step(self.params, self.state, jnp.asarray(rows))
        return float(value)


def held_out_rows(documents: list[np.ndarray], length: int) -> np.ndarray:
    """The held-out documents in rows of one length."""
    return pack(documents, length + 1, np.random.default_rng(SEED), BOS_ID)


def train(documents: list[np.ndarray], held_out: list[np.ndarray], checkpoint: Path) -> list[dict[str, float]]:
    """Trains, saving the parameters at each evaluation. Returns the log: seconds, training and held-out losses."""
    trainer, log, recent = Trainer(), [], []
    rows_of = {length: TOKENS_A_STEP // length for length in sorted(set(LENGTHS))}
    feeds = {length: batches(documents, length + 1, rows, BOS_ID, SEED + length) for length, rows in rows_of.items()}
    begun = time.perf_counter()
    for step in range(1, STEPS + 1):
        recent.append(trainer.step(next(feeds[LENGTHS[step % len(LENGTHS)]])))
        if step % EVAL_EVERY == 0 or step == STEPS:
            entry = {"step": step, "seconds": time.perf_counter() - begun, "training": float(np.mean(recent))}
            for length, rows in rows_of.items():
                entry[f"held_out_{length}"] = held_out_loss(
                    trainer.loss, trainer.params, held_out_rows(held_out, length), rows
                )
            print(" · ".join(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)
            log.append(entry)
            recent.clear()
            np.savez(checkpoint, **trainer.params)
    return log


def file_loss(file: Path, held_out: list[np.ndarray], length: int) -> float:
    """Held-out loss of an exported file, read as any other model is."""
    with open_gguf(file) as gguf:
        config = config_from_gguf(gguf.metadata, gguf.tensors, file=str(file))
        devices = jax.devices()[:1]
        plan = plan_run(gguf, config, None, devices, Sizes(context=length))
        [stage] = load_model(gguf, plan, bind(plan, devices), implementations=Implementations("xla", "xla")).stages
    loss = jax.jit(lambda state, rows: batch_loss(stage.decode.graphdef, state, rows))
    return held_out_loss(loss, stage.decode.state, held_out_rows(held_out, length), TOKENS_A_STEP // length)


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
    documents, held_out = tokenize(tokenizer, texts), tokenize(tokenizer, held_texts)
    print(f"{sum(map(len, documents)):,} tokens to train on, {sum(map(len, held_out)):,} held out", flush=True)
    if not arguments.export_only:
        log = train(documents, held_out, checkpoint)
        (arguments.work / "log.json").write_text(json.dumps(log, indent=1))
    with np.load(checkpoint) as saved:
        files = export(dict(saved), tokenizer, arguments.out)
    for file in files:
        print(f"{file.name}: {file.stat().st_size:,} bytes, held-out loss {file_loss(file, held_out, 512):.3f}")


if __name__ == "__main__":
    main()
