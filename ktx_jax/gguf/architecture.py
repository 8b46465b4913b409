# SPDX-License-Identifier: Apache-2.0
"""Whether a GGUF holds a model of an architecture that this package implements."""

from ktx_jax.gguf.errors import GGUFError, quote
from ktx_jax.gguf.reader import GGUF

SUPPORTED_ARCHITECTURES = ("deepseek2",)

# Contents that are no language model, by `general.type`.
_OTHER_CONTENTS = {
    "mmproj": "a vision or audio projector",
    "adapter": "an adapter (LoRA)",
    "imatrix": "an importance matrix",
}


def check_architecture(gguf: GGUF) -> None:
    """Refuses everything but a DeepSeek-V2 language model, by name.

    Not part of opening a file: the tokenizer also reads vocabularies of other architectures.

    Raises:
        GGUFError: naming what was found and what is supported.
    """
    supported = f"supported: {', '.join(SUPPORTED_ARCHITECTURES)} (DeepSeek-V2, V2.5, Coder-V2, V2-Lite)"
    architecture = gguf.metadata.get("general.architecture")
    content = str(gguf.metadata.get("general.type", "model"))
    if architecture == "clip":
        content = "mmproj"
    if content != "model":
        words = _OTHER_CONTENTS.get(content, f"of the type {quote(content)}")
        raise GGUFError(
            f"{gguf.path}: this file is {words}, not a language model "
            f"(general.architecture {quote(str(architecture))}); {supported}"
        )
    if architecture is None:
        raise GGUFError(f"{gguf.path}: general.architecture is not set; {supported}")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise GGUFError(f"{gguf.path}: the architecture is {quote(str(architecture))}; {supported}")
