# SPDX-License-Identifier: Apache-2.0
"""What results depend on, in a few JSON values that tell one run from another."""

import hashlib
from typing import Any

from ktx_jax.gguf.reader import open_gguf
from ktx_jax.llm import LLM


def model_identity(llm: LLM) -> dict[str, Any]:
    """The model as it runs here: its files (names and sizes), configuration, and arithmetic."""
    with open_gguf(llm.path) as gguf:
        files = {part.name: part.stat().st_size for part in gguf.files}
    return {
        "files": files,
        "config": digest(repr(llm.config)),
        "dtype": llm.dtype.__name__,
        "implementation": llm.implementation,
    }


def digest(text: str) -> str:
    """A text's identity."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
