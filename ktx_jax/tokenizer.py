# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, from the vocabulary that a GGUF file carries.

Byte-level BPE (`tokenizer.ggml.model = gpt2`): text is cut into words (`ktx_jax.pretokenizers`), each word's UTF-8
bytes become characters of a printable 256-letter alphabet, and pairs are merged in the order of
`tokenizer.ggml.merges`. The Rust `tokenizers` package does that; decoding is done here on exact bytes.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers.models import BPE

from ktx_jax.errors import KtxError
from ktx_jax.gguf.errors import quote
from ktx_jax.gguf.reader import GGUF, open_gguf
from ktx_jax.pretokenizers import pre_tokenizer

# The printable bytes stand for themselves; the others, in order, for U+0100 and up (GPT-2's alphabet).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_UNPRINTABLE = tuple(b for b in range(256) if b not in _PRINTABLE)
BYTE_OF_CHARACTER = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_UNPRINTABLE)}
CHARACTER_OF_BYTE = {b: c for c, b in BYTE_OF_CHARACTER.items()}

# No UTF-8 text holds these bytes, and DeepSeek's vocabularies leave them out.
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Tokenizer:
    """A vocabulary and its merges. Immutable, and safe to share between threads.

    Attributes:
        vocab_size: number of ids.
        bos_id: the beginning-of-text id, or None where the file names none.
        eos_id: the end-of-text id, or None where the file names none.
        eos_ids: the ids that end a text or a turn, `eos_id` among them.
        special_ids: control tokens: never part of a text, skipped when decoding unless asked for.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    special_ids: frozenset[int]

    def __init__(self, metadata: Mapping[str, Any]):
        """Build from GGUF metadata (the `tokenizer.ggml.*` keys).

        Raises:
            KtxError: a key is absent, of the wrong type or contradicts another; an unknown tokenizer.
        """
        self._tokens: Sequence[str] = _strings(metadata, _TOKENS)
        self.vocab_size = len(self._tokens)
        types = _token_types(metadata, self.vocab_size)
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise KtxError(
                f"tokenizer.ggml.model is {quote(str(model))}; ktx-jax reads 'gpt2', the byte-level BPE of DeepSeek"
            )
        self._verbatim = {i for i, kind in enumerate(types) if kind not in (TokenType.NORMAL, TokenType.BYTE)}
        self._byte_tokens = {
            i: _byte_of_token(self._tokens[i]) for i, kind in enumerate(types) if kind == TokenType.BYTE
        }
        self.special_ids = frozenset(
            i
            for i, kind in enumerate(types)
            if kind == TokenType.CONTROL or (kind == TokenType.USER_DEFINED and _looks_special(self._tokens[i]))
        )
        self.bos_id = _token_id(metadata, "bos_token_id", self.vocab_size)
        self.eos_id = _token_id(metadata, "eos_token_id", self.vocab_size)
        ends = (_token_id(metadata, key, self.vocab_size) for key in _END_KEYS)
        self.eos_ids = frozenset(i for i in ends if i is not None)
        self._prefix = [self.bos_id] if self.bos_id is not None and _flag(metadata, "add_bos_token", True) else []
        self._suffix = [self.eos_id] if self.eos_id is not None and _flag(metadata, "add_eos_token", False) else []
        self._build_encoders(metadata, types)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer of GGUF `metadata`; see `Tokenizer`."""
        return cls(metadata)

    @classmethod
    def from_gguf(cls, source: str | Path | GGUF) -> "Tokenizer":
        """The tokenizer of a GGUF file: a path (file, part or directory) or an open `GGUF`.

        Raises:
            GGUFError: the file cannot be read.
            KtxError: its tokenizer is missing, broken or unknown.
        """
        if isinstance(source, GGUF):
            return cls(source.metadata)
        with open_gguf(source) as file:
            return cls(file.metadata)

    def _build_encoders(self, metadata: Mapping[str, Any], types: Sequence[int]) -> None:
        merges = [(left, right) for left, _, right in (m.partition(" ") for m in _strings(metadata, _MERGES))]
        # A string that two ids share is encoded as the first of them.
        vocab = dict(zip(reversed(self._tokens), range(self.vocab_size - 1, -1, -1), strict=True))
        for i, byte in self._byte_tokens.items():
            vocab.setdefault(CHARACTER_OF_BYTE[byte], i)
        self._unwritable = {b for b, c in CHARACTER_OF_BYTE.items() if c not in vocab} - _NEVER_IN_UTF8
        try:
            model = BPE(vocab=vocab, merges=merges)
        except Exception as error:  # the package raises plain Exception
            raise KtxError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {quote(str(error))}") from error
        splits = pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "default")))
        kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
        added = [i for i, kind in enumerate(types) if kind in kinds and vocab[self._tokens[i]] == i]
        self._with_special = self._encoder(model, splits, added)
        self._plain = self._encoder(model, splits, [i for i in added if i not in self.special_ids])

    def _encoder(self, model: BPE, splits: Any, added: Sequence[int]) -> tokenizers.Tokenizer:
        encoder = tokenizers.Tokenizer(model)  # shares the model, so two encoders cost one vocabulary
        encoder.pre_tokenizer = splits
        encoder.add_special_tokens([tokenizers.AddedToken(self._tokens[i], normalized=False) for i in added])
        return encoder

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """The ids of `text`.

        Args:
            text: any text.
            add_special_tokens: put BOS before and EOS after it, as the file asks (`add_bos_token`, `add_eos_token`).
            parse_special: read `<｜User｜>` and the like in the text as control tokens. False encodes them as
                ordinary characters: for text from strangers.

        Raises:
            KtxError: the text holds half of a surrogate pair, or a byte that the vocabulary cannot write.
        """
        encoder = self._with_special if parse_special else self._plain
        self._check(text)
        ids = encoder.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _check(self, text: str) -> None:
        try:
            present = text.encode()
        except UnicodeEncodeError as error:
            raise KtxError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from error
        if self._unwritable and (absent := self._unwritable.intersection(present)):
            listed = " ".join(f"{b:02x}" for b in sorted(absent))
            raise KtxError(f"the vocabulary has no token for these bytes (hexadecimal) of the text: {listed}")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that `token` adds to a text; of a control token, its name.

        Raises:
            KtxError: an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise KtxError(f"token id {token} is outside the vocabulary (0 to {self.vocab_size - 1})")
        if token in self._byte_tokens:
            return bytes([self._byte_tokens[token]])
        text = self._tokens[token]
        if token not in self._verbatim:
            try:
                return bytes([BYTE_OF_CHARACTER[c] for c in text])
            except KeyError:
                pass  # not in the byte alphabet: some files mark added tokens as normal ones
        return text.encode()

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            KtxError: an id outside the vocabulary.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode(errors="replace")

    def stream(self, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Decodes ids one by one; the pieces, joined, are `Tokenizer.decode` of all of them.

    A piece holds whole characters only: the bytes of an unfinished one wait for the next id. Bytes that can no
    longer become a character come out as U+FFFD at once. Time is linear in the number of bytes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, possibly none.

        Raises:
            KtxError: an id outside the vocabulary.
        """
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or nothing. Starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    values = metadata.get(key)
    if values is None:
        raise KtxError(f"the file has no {key}: it carries no tokenizer. Pass token ids, or convert the model again")
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise KtxError(f"{key}: expected an array of strings, found {type(values).__name__}")
    return values


def _token_types(metadata: Mapping[str, Any], vocab_size: int) -> Sequence[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [int(TokenType.NORMAL)] * vocab_size
    if not isinstance(types, list | tuple) or len(types) != vocab_size:
        found = f"{len(types)} values" if isinstance(types, list | tuple) else type(types).__name__
        raise KtxError(f"tokenizer.ggml.token_type: expected one number a token ({vocab_size}), found {found}")
    return types


def _token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise KtxError(f"tokenizer.ggml.{name}: expected an id from 0 to {vocab_size - 1}, found {quote(str(value))}")
    return int(value)


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise KtxError(f"tokenizer.ggml.{name}: expected true or false, found {quote(str(value))}")
    return value


def _byte_of_token(text: str) -> int:
    """The byte that a byte token such as `<0x0A>` stands for."""
    try:
        if len(text) != 6 or not (text.startswith("<0x") and text.endswith(">")):
            raise ValueError
        return int(text[3:5], 16)
    except ValueError:
        raise KtxError(f"tokenizer.ggml.tokens: byte token {quote(text)} is not of the form <0x0A>") from None


def _looks_special(text: str) -> bool:
    # Older converters mark DeepSeek's <｜User｜> and the like as user-defined, the type meant for ordinary added words.
    return text.startswith(("<｜", "<|")) and text.endswith(("｜>", "|>"))
