# SPDX-License-Identifier: Apache-2.0
"""The one exception of the GGUF reader, and how names from a file are shown in it."""

from ktx_jax.errors import KtxError

SHOWN_CHARACTERS = 100


class GGUFError(KtxError):
    """A GGUF file, or a set of them, cannot be used; the message says which, why and what to do."""


def quote(text: str) -> str:
    """`text` from a file, fit for a message: escaped (no terminal codes) and of bounded length."""
    if len(text) > SHOWN_CHARACTERS:
        return f"{text[:SHOWN_CHARACTERS]!r}... ({len(text)} characters)"
    return repr(text)
