# SPDX-License-Identifier: Apache-2.0
"""What results depend on, in a few JSON values that tell one run from another."""

import hashlib
from typing import Any

from ktx_jax.gguf.reader import GGUF, open_gguf
from ktx_jax.llm import LLM

_SAMPLES, _SAMPLE = 16, 64  # of a tensor: pieces, evenly spread, and bytes of each


def model_identity(llm: LLM) -> dict[str, Any]:
    """The model as it runs here: its files (names and sizes), weights, tokenizer, configuration, and arithmetic."""
    with open_gguf(llm.path) as gguf:
        files = {part.name: part.stat().st_size for part in gguf.files}
        weights = _sampled(gguf)
        tokenizer = {key: value for key, value in gguf.metadata.items() if key.startswith("tokenizer.ggml.")}
    return {
        "files": files,
        "weights": weights,
        "tokenizer": digest(repr(sorted(tokenizer.items()))),
        "config": digest(repr(llm.config)),
        "dtype": llm.dtype.__name__,
        "implementation": llm.implementation,
    }


def _sampled(gguf: GGUF) -> str:
    """The identity of the weights, from a little of each tensor: files of one name and size differ all over if at
    all, and reading hundreds of gigabytes would take longer than many a run."""
    seen = hashlib.sha256()
    for name, tensor in sorted(gguf.tensors.items()):
        data = gguf.blocks(name).reshape(-1)
        seen.update(f"{name} {tensor.shape} {tensor.ggml_type.name}\n".encode())
        last = max(len(data) - _SAMPLE, 0)
        for piece in range(_SAMPLES):
            begin = last * piece // (_SAMPLES - 1)
            seen.update(data[begin : begin + _SAMPLE].tobytes())
    return seen.hexdigest()[:16]


def digest(text: str) -> str:
    """A text's identity."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
