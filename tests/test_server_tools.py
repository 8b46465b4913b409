# SPDX-License-Identifier: Apache-2.0
"""Calls of tools: the markup read in pieces of any size, and the grammar that makes it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktx_jax.chat import template_names
from ktx_jax.engine.grammar import Grammar
from ktx_jax.resources import demo_model
from ktx_jax.server.tools import (
    BEGIN,
    CALL,
    CALL_END,
    END,
    MARKS,
    SEPARATOR,
    CallArguments,
    CallParser,
    CallStart,
    MarkupDecoder,
    call_grammar,
    described,
    told,
)
from ktx_jax.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("first", "second-one")]
NONE = [{"type": "function", "function": {"name": "ping"}}]


def call(name, arguments):
    return f"{CALL}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def calls(*pairs):
    return BEGIN + "\n".join(call(*pair) for pair in pairs) + END


def parsed(pieces):
    """Text, and (name, arguments) of each call."""
    parser, text, found = CallParser(), "", []
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    for part in parts:
        if isinstance(part, str):
            text += part
        elif isinstance(part, CallStart):
            assert part.index == len(found)
            found.append((part.name, ""))
        else:
            assert isinstance(part, CallArguments)
            name, arguments = found[part.index]
            found[part.index] = (name, arguments + part.text)
    return text, found


names = st.from_regex(r"[a-zA-Z0-9_-]{1,20}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(["```", "\n```", "<｜", "}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(max_size=20).filter(lambda text: "<｜tool" not in text)


@given(texts, st.lists(st.tuples(names, values), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_what_was_written_is_read_however_it_is_cut(text, wanted, random):
    whole = text + calls(*((name, json.dumps(value, ensure_ascii=False)) for name, value in wanted))
    cuts = sorted(random.sample(range(len(whole) + 1), min(len(whole), random.randrange(30))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    said, found = parsed(pieces)
    assert said == text
    assert [(name, json.loads(arguments)) for name, arguments in found] == wanted


@given(st.lists(st.sampled_from([*MARKS, "function", "z", "\n```json\n", "\n```", "{}", " ", "<｜tool"]), max_size=12))
def test_broken_markup_gives_the_same_in_any_pieces_and_loses_no_words(pieces):
    whole = "".join(pieces)
    assert parsed(whole) == parsed(pieces) == parsed([whole])
    text, found = parsed([whole])
    rest = text + "".join(name + arguments for name, arguments in found)
    assert rest.count("z") == whole.count("z")


def test_a_call_that_is_cut_short():
    text, found = parsed([BEGIN + f'{CALL}function{SEPARATOR}first\n```json\n{{"n": 1}}\n``'])
    assert (text, found) == ("", [("first", '{"n": 1}')])
    assert parsed([BEGIN + CALL + "function"]) == (CALL + "function", [])
    assert parsed(["plain <｜tool▁calls"]) == ("plain <｜tool▁calls", [])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(demo_model())


@pytest.fixture(scope="module")
def with_marks(oracle):
    """A vocabulary in which the marks are tokens of their own, as in V2.5's."""
    from ktx_jax.gguf.reader import open_gguf

    with open_gguf(oracle / "vocab" / "ggml-vocab-deepseek-llm.gguf") as file:
        metadata = dict(file.metadata)
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    metadata["tokenizer.ggml.tokens"] = tokens + list(MARKS)
    metadata["tokenizer.ggml.token_type"] = types + [4] * len(MARKS)  # user-defined, as converters write them
    return Tokenizer(metadata)


def accepted(grammar, tokenizer, text):
    """Whether the grammar lets the model write `text`, and end there."""
    match = grammar.start()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return all(match.accept(token) for token in ids) and (match.complete or match.accept(tokenizer.eos_id))


def check_grammar(tokenizer):
    good = calls(("first", '{"n":1}'))
    two = calls(("first", '{"n":1}'), ("second-one", '{"n":2}'))
    wrong = [calls(("third", '{"n":1}')), calls(("first", '{"n":3}')), calls(("first", "{}")), good[: -len(END)]]
    forced = Grammar.from_lark(call_grammar(TOOLS, tokenizer, required=True, parallel=True), tokenizer)
    assert accepted(forced, tokenizer, good)
    assert accepted(forced, tokenizer, two)
    assert not accepted(forced, tokenizer, "Hello")
    free = Grammar.from_lark(call_grammar(TOOLS, tokenizer, required=False, parallel=False), tokenizer)
    assert accepted(free, tokenizer, "Hello, <b>.\n")
    assert accepted(free, tokenizer, "Wait. " + good)
    assert not accepted(free, tokenizer, two)
    for text in wrong:
        assert not accepted(forced, tokenizer, text)
        assert not accepted(free, tokenizer, text)
    ping = Grammar.from_lark(call_grammar(NONE, tokenizer, required=True, parallel=True), tokenizer)
    assert accepted(ping, tokenizer, calls(("ping", "{}")))


def test_the_grammar_where_marks_are_text(tokenizer):
    check_grammar(tokenizer)


def test_the_grammar_where_marks_are_tokens(with_marks):
    check_grammar(with_marks)


def test_marks_that_are_tokens_are_decoded(with_marks):
    decoder, text = MarkupDecoder(with_marks), "é" + calls(("first", "{}"))
    ids = [*with_marks.encode(text, add_special_tokens=False), with_marks.eos_id]
    assert sum(i in with_marks.special_ids for i in ids) == 6
    assert "".join(map(decoder.push, ids)) + decoder.flush() == text


def test_how_the_model_is_told():
    text = described(TOOLS)
    assert "- `first`:\n```json\n" in text
    assert json.loads(text.split("```json\n")[1].split("\n```")[0]) == TOOLS[0]["function"]
    assert [m["content"] for m in told([{"role": "system", "content": "Be brief."}], "T")] == ["Be brief.\n\nT"]
    assert [m["role"] for m in told([{"role": "user", "content": "x"}], "T")] == ["system", "user"]


def test_what_templates_know(oracle):
    names = template_names((oracle / "vocab" / "v25_chat_template.jinja").read_text())
    assert "tool_calls" in names
    assert "tools" not in names
    assert "tools" in template_names("{% if tools %}x{% endif %}")
