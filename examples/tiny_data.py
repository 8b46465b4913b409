# SPDX-License-Identifier: Apache-2.0
"""Token streams for training the embedded model: pages and conversations packed into rows of equal length."""

import random
from collections.abc import Iterator

import numpy as np
from tiny_chat import BOS, EOS, conversations, render_conversation
from tiny_corpus import load_entries, pages
from tokenizers import Tokenizer


def load_texts(seed: int) -> tuple[list[str], list[str]]:
    """Documents (pages and conversations) for training, and those held out for evaluation."""
    entries = load_entries()
    sets = []
    for held_out in (False, True):
        chosen = [entry for entry in entries if entry.held_out == held_out]
        talks = conversations(chosen, random.Random(seed))
        sets.append([f"{page}{EOS}" for page in pages(chosen)] + [render_conversation(talk) for talk in talks])
    return sets[0], sets[1]


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Each document's token ids, BOS first."""
    encoded = tokenizer.encode_batch([BOS + text for text in texts])
    return [np.array(item.ids, np.int32) for item in encoded]


def pack(documents: list[np.ndarray], length: int, rng: np.random.Generator, bos: int) -> np.ndarray:
    """Rows `[rows, length]` cut from the shuffled documents laid end to end; every row begins with BOS."""
    order = rng.permutation(len(documents))
    stream = np.concatenate([documents[i] for i in order])
    stream = np.roll(stream, rng.integers(len(stream)))  # other cuts each epoch
    rows = stream[: len(stream) // (length - 1) * (length - 1)].reshape(-1, length - 1)
    return np.concatenate([np.full((len(rows), 1), bos, np.int32), rows], axis=1)


def batches(documents: list[np.ndarray], length: int, size: int, bos: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches `[size, length]`, epoch after epoch in new orders."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.permutation(pack(documents, length, rng, bos))
        for start in range(0, len(rows) - size + 1, size):
            yield rows[start : start + size]
