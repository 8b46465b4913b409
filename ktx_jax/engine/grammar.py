# SPDX-License-Identifier: Apache-2.0
"""What a reply has to match: JSON of a schema, a regular expression, or a grammar (`llguidance`, extra `serve`)."""

import json
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt32

from ktx_jax.errors import KtxError
from ktx_jax.tokenizer import Tokenizer


class Grammar:
    """A constraint, compiled for a tokenizer. Immutable, and safe to share between requests and threads.

    Raises (all ways to make one):
      KtxError: the schema, expression or grammar is not valid, too large, or uses what is not supported; or
        `llguidance` is not installed.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, what: str):
        self._vocabulary = _vocabulary(tokenizer)
        self._source = source
        self._first = self._matcher(what)

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any] | str, tokenizer: Tokenizer) -> "Grammar":
        """Replies that are JSON valid under `schema`. Keywords that cannot be held to are an error."""
        llguidance = _llguidance()
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            # Compact: a model that may write endless white space between two tokens sometimes does.
            source = llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        except ValueError as error:
            raise KtxError(f"the JSON schema cannot be used: {error}") from None
        return cls(source, tokenizer, what="the JSON schema")

    @classmethod
    def json_object(cls, tokenizer: Tokenizer) -> "Grammar":
        """Replies that are one JSON object, whatever is in it."""
        return cls.from_json_schema({"type": "object"}, tokenizer)

    @classmethod
    def from_regex(cls, pattern: str, tokenizer: Tokenizer) -> "Grammar":
        """Replies that match a regular expression (Rust's syntax, without look-around) as a whole."""
        return cls(_llguidance().LLMatcher.grammar_from_regex(pattern), tokenizer, what="the regular expression")

    @classmethod
    def from_lark(cls, text: str, tokenizer: Tokenizer) -> "Grammar":
        """Replies that match a context-free grammar in llguidance's dialect of Lark: `start: ...`, terminals in
        capitals, `%json {...}` for a JSON schema within, `<[3]>` or `<|name|>` for a special token."""
        return cls(_llguidance().LLMatcher.grammar_from_lark(text), tokenizer, what="the grammar")

    def start(self) -> "Match":
        """A match from the beginning, for one reply."""
        return Match(self._first.deep_copy(), self._vocabulary.vocab_size)

    def _matcher(self, what: str) -> Any:
        matcher = _llguidance().LLMatcher(self._vocabulary, self._source, log_level=0)
        if matcher.is_error():
            raise KtxError(f"{what} cannot be used: {matcher.get_error().splitlines()[0]}")
        return matcher


class Match:
    """How far one reply has come in its grammar. Not safe to use from two threads at once."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        """The tokens that may come next: bit i % 32 of word i // 32. End tokens are among them where it may end."""
        mask = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        return mask

    def accept(self, token: int) -> bool:
        """Goes on by a token; False if the grammar does not allow it there."""
        return bool(self._matcher.consume_token(token))

    @property
    def complete(self) -> bool:
        """Whether nothing can follow: the reply ends here."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise KtxError(f"the reply's grammar became too large: {self._matcher.get_error().splitlines()[0]}")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise KtxError("constrained replies need llguidance: pip install 'ktx-jax[serve]'") from error
    return llguidance


_making = threading.Lock()
_VOCABULARIES: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()


def prepare_grammars(tokenizer: Tokenizer) -> None:
    """Does now what the first `Grammar` of a tokenizer would do: half a second for 100,000 tokens.

    Raises:
      KtxError: `llguidance` is not installed.
    """
    _vocabulary(tokenizer)


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance sees it, made once: a trie of all its tokens."""
    with _making:
        if tokenizer not in _VOCABULARIES:
            llguidance = _llguidance()
            wrapper = llguidance.TokenizerWrapper(_Plain(tokenizer))
            _VOCABULARIES[tokenizer] = llguidance.LLTokenizer(
                wrapper, n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.eos_ids)
            )
        return _VOCABULARIES[tokenizer]


class _Plain:
    """A tokenizer in the form that llguidance asks for; it does not keep the tokenizer alive."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = weakref.ref(tokenizer)

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode() if isinstance(text, bytes) else text
        tokenizer = self._tokenizer()
        return [] if tokenizer is None else tokenizer.encode(plain, add_special_tokens=False, parse_special=False)
