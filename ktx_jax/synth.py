# SPDX-License-Identifier: Apache-2.0
"""GGUF files of true shapes and type mixes with random weights: for sizing, speed and sharding without a download."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, TokenType

from ktx_jax.gguf.mixes import MIXES
from ktx_jax.gguf.quantize import quantize
from ktx_jax.gguf.random_blocks import random_pieces
from ktx_jax.gguf.writer import TensorSource, write_gguf
from ktx_jax.presets import VOCAB_SIZE, PlannedTensor, Shape, architecture_metadata, planned_tensors, resolve
from ktx_jax.tokenizer import CHARACTER_OF_BYTE

BOS_ID, EOS_ID = 100000, 100001


def synthesize(
    shape: str | Shape,
    out: str | os.PathLike[str],
    quant: str,
    layers: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a GGUF file of true shapes and type mix with random weights; returns its path.

    Matrices have mean 0 and standard deviation 1/sqrt(K), so activations keep their size through the layers and the
    router spreads; norms are ones. The vocabulary knows the 256 bytes and a few merges, so any text can be tokenized.
    `progress(done, total)` is called with bytes written.

    Raises `KtxError` as `planned_tensors` and `write_gguf` do, too little free space included.
    """
    resolved = resolve(shape, layers)
    tensors = (
        TensorSource(t.name, t.shape, t.ggml_type, partial(_random_weight, t, seed, index))
        for index, t in enumerate(planned_tensors(resolved, quant))
    )
    write_gguf(out, _metadata(resolved, quant), tensors, progress)
    return Path(out)


def _random_weight(tensor: PlannedTensor, seed: int, index: int) -> Iterable[np.ndarray]:
    if tensor.name.endswith("_norm.weight"):
        return (quantize(np.ones(tensor.shape, np.float32), tensor.ggml_type),)
    rng = np.random.Generator(np.random.SFC64([seed, index]))
    elements = int(np.prod(tensor.shape, dtype=np.int64))
    return random_pieces(rng, tensor.ggml_type, elements, tensor.shape[-1] ** -0.5)


def _metadata(s: Shape, quant: str) -> dict[str, Any]:
    return {
        "general.architecture": "deepseek2",
        "general.type": "model",
        "general.name": f"Synthetic {s.name}",
        "general.description": "Random weights in true shapes: for sizing, speed and sharding, not for text.",
        "general.file_type": int(MIXES[quant].file_type),
        "general.quantization_version": GGML_QUANT_VERSION,
        **architecture_metadata(s),
        **_vocabulary(),
    }


_MERGES = ("Ġ t", "h e", "i n", "e r", "a n", "o n", "Ġt he", "in g")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}"
    "{% else %}{% if message.role == 'user' %}User: {% endif %}{{ message.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _tokens() -> Iterator[tuple[str, TokenType]]:
    """Bytes, merged pairs and words that no merge makes, then the special ids where DeepSeek's are."""
    for byte in range(256):
        yield CHARACTER_OF_BYTE[byte], TokenType.NORMAL
    for merge in _MERGES:
        yield merge.replace(" ", ""), TokenType.NORMAL
    for i in range(256 + len(_MERGES), BOS_ID):
        yield f"Ġt{i}", TokenType.NORMAL
    yield "<｜begin▁of▁sentence｜>", TokenType.CONTROL
    yield "<｜end▁of▁sentence｜>", TokenType.CONTROL
    for i in range(EOS_ID + 1, VOCAB_SIZE):
        yield f"[PAD{i}]", TokenType.UNUSED


def _vocabulary() -> dict[str, Any]:
    tokens, kinds = zip(*_tokens(), strict=True)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": BOS_ID,
        "tokenizer.ggml.eos_token_id": EOS_ID,
        "tokenizer.ggml.padding_token_id": EOS_ID,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }
