# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: exact ids, exact bytes, whole characters."""

import json
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktx_jax.errors import KtxError
from ktx_jax.pretokenizers import SUPPORTED
from ktx_jax.tokenizer import Tokenizer

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("tokenizer.json").read_text())
METADATA = GOLDEN["metadata"]
TINY = Tokenizer(METADATA)
BOS, EOS, USER, ASSISTANT, EOT, THINK, Y_UMLAUT = range(TINY.vocab_size - 7, TINY.vocab_size)
LOOK_ALIKE = "<｜User｜>"


def changed(**keys) -> dict:
    """The tiny metadata with some `tokenizer.ggml.` keys set, or removed where None."""
    metadata = METADATA | {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
    return {k: v for k, v in metadata.items() if v is not None}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['pre']}-{c['text']!r}")
def test_golden_ids(case):
    tokenizer = Tokenizer(changed(pre=case["pre"]))
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]


@pytest.fixture(scope="module")
def deepseek(oracle) -> tuple[Path, dict]:
    """DeepSeek's own vocabulary: the file and its metadata."""
    path = oracle / "vocab" / "ggml-vocab-deepseek-llm.gguf"
    reader = gguf.GGUFReader(path)
    return path, {key: field.contents() for key, field in reader.fields.items()}


def test_deepseek_vocabulary(deepseek):
    path, metadata = deepseek
    start = time.perf_counter()
    tokenizer = Tokenizer(metadata)
    assert time.perf_counter() - start < 1.5
    inputs = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = Path(f"{path}.out").read_text().split("\n")
    assert len(inputs) == len(outputs) == 47
    for text, ids in zip(inputs, outputs, strict=True):
        expected = [int(i) for i in ids.split()]
        assert tokenizer.encode(text, add_special_tokens=False) == expected, repr(text)
        assert tokenizer.encode(text) == [100000, *expected]
        assert tokenizer.decode(expected) == text
    assert tokenizer.bos_id == 100000
    assert tokenizer.eos_ids == {100001}
    assert tokenizer.vocab_size == 102400


def test_from_gguf(oracle):
    tokenizer = Tokenizer.from_gguf(oracle / "mini" / "q8_0.gguf")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (512, 0, {1})
    assert tokenizer.decode(tokenizer.encode("def f(x): return x")) == "def f(x): return x"


ANY_TEXT = st.text() | st.lists(
    st.sampled_from([LOOK_ALIKE, "<think>", "ÿ", "<｜", "｜>", " ", "\n", "the", "7", "词", "\u0301", "🙂"])
).map("".join)


@pytest.mark.parametrize("pre", SUPPORTED)
def test_round_trip(pre):
    tokenizer = Tokenizer(changed(pre=pre))

    @given(ANY_TEXT)
    def holds(text):
        plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert tokenizer.decode(plain) == text
        assert not tokenizer.special_ids & set(plain)
        parsed = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(parsed, skip_special_tokens=False) == text

    holds()


@given(st.lists(st.integers(0, TINY.vocab_size - 1)), st.booleans())
@example([TINY.encode("词", False)[0], BOS, *TINY.encode("词", False)[1:]], True)
def test_streaming_is_decoding(ids, skip):
    stream = TINY.stream(skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == TINY.decode(ids, skip)


def test_streaming_gives_whole_characters_at_once():
    byte = [METADATA["tokenizer.ggml.tokens"].index(c) for c in "ðŁĻĤ"]  # U+1F642, a byte each
    stream = TINY.stream()
    assert [stream.push(i) for i in byte] == ["", "", "", "🙂"]
    assert stream.push(byte[0]) == ""
    assert stream.push(byte[0]) == "�"  # the first can no longer become a character
    assert stream.flush() == "�"
    assert stream.flush() == ""


def test_streaming_takes_linear_time():
    ids = TINY.encode("词" * 30_000, add_special_tokens=False)
    stream = TINY.stream()
    start = time.perf_counter()
    assert len("".join(stream.push(i) for i in ids)) == 30_000
    assert time.perf_counter() - start < 5


def test_special_tokens():
    assert TINY.encode("<｜User｜>the<｜end▁of▁sentence｜>")[:2] == [BOS, USER]
    assert TINY.encode("<｜User｜>the<｜end▁of▁sentence｜>")[-1] == EOS
    assert USER not in TINY.encode(LOOK_ALIKE, parse_special=False)
    assert THINK in TINY.encode("<think>", parse_special=False)  # a word of the vocabulary, not a control token
    assert TINY.decode([BOS, THINK, Y_UMLAUT, EOS]) == "<think>ÿ"
    assert TINY.decode([USER, ASSISTANT], skip_special_tokens=False) == "<｜User｜><｜Assistant｜>"
    assert TINY.eos_ids == {EOS, EOT}
    assert TINY.special_ids == {BOS, EOS, USER, ASSISTANT, EOT}


def test_special_tokens_of_older_files_are_user_defined():
    types = METADATA["tokenizer.ggml.token_type"].copy()
    types[USER] = 4
    tokenizer = Tokenizer(changed(token_type=types))
    assert tokenizer.encode(LOOK_ALIKE, False) == [USER]
    assert USER not in tokenizer.encode(LOOK_ALIKE, False, parse_special=False)


def test_added_token_spelled_like_an_ordinary_one():
    tokens, types = METADATA["tokenizer.ggml.tokens"].copy(), METADATA["tokenizer.ggml.token_type"].copy()
    tokens[0], types[0] = "ÿ", 1  # the byte ff; the added token is the letter
    tokenizer = Tokenizer(changed(tokens=tokens, token_type=types))
    assert tokenizer.decode(tokenizer.encode("ÿ")) == "ÿ"


def test_beginning_and_end_as_the_file_says():
    ids = TINY.encode("the", add_special_tokens=False)
    assert TINY.encode("the") == [BOS, *ids]
    assert Tokenizer(changed(add_bos_token=False)).encode("the") == ids
    assert Tokenizer(changed(add_eos_token=True)).encode("the") == [BOS, *ids, EOS]
    assert Tokenizer(changed(bos_token_id=None)).encode("the") == ids


def test_byte_tokens_stand_in_for_missing_bytes():
    tokens, types = METADATA["tokenizer.ggml.tokens"].copy(), METADATA["tokenizer.ggml.token_type"].copy()
    newline = tokens.index("Ċ")
    tokens[newline], types[newline] = "<0x0A>", 6
    tokenizer = Tokenizer(changed(tokens=tokens, token_type=types))
    assert tokenizer.encode("\n", False) == [newline]
    assert tokenizer.token_bytes(newline) == b"\n"
    tokens[newline], types[newline] = "nothing", 1
    with pytest.raises(KtxError, match=r"no token for these bytes.*: 0a"):
        Tokenizer(changed(tokens=tokens, token_type=types)).encode("a\nb")


def test_token_bytes():
    for i in range(TINY.vocab_size):
        assert TINY.token_bytes(i).decode(errors="replace") == TINY.decode([i], skip_special_tokens=False)
    assert TINY.token_bytes(USER) == LOOK_ALIKE.encode()
    with pytest.raises(KtxError, match="outside the vocabulary"):
        TINY.token_bytes(TINY.vocab_size)
    with pytest.raises(KtxError, match="token id -1"):
        TINY.decode([-1])


def test_decodes_numpy_ids():
    assert TINY.decode(np.array(TINY.encode("the page")).tolist()) == "the page"


def test_lone_surrogate():
    with pytest.raises(KtxError, match="lone surrogate at character 2"):
        TINY.encode("ab\ud800")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre": "llama-bpe"}, "'llama-bpe'.*supported: deepseek-llm, deepseek-coder, deepseek-v3"),
        ({"pre": None}, "'default'"),
        ({"model": "llama"}, "model is 'llama'.*reads 'gpt2'"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, "expected an array of strings"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["Ġ notthere"]}, "merges does not fit"),
        ({"merges": ["Ġ"]}, "merges does not fit"),
        ({"token_type": [1]}, "one number a token"),
        ({"token_type": 1}, "found int"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id: expected an id from 0 to"),
        ({"eos_token_id": "1"}, "found '1'"),
        ({"add_bos_token": 2}, "expected true or false"),
        ({"token_type": [6] * TINY.vocab_size}, "is not of the form"),
    ],
)
def test_broken_metadata(keys, message):
    with pytest.raises(KtxError, match=message):
        Tokenizer(changed(**keys))
