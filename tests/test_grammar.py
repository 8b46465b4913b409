# SPDX-License-Identifier: Apache-2.0
"""Replies held to JSON schemas, expressions and grammars, on the embedded model."""

import json
import re
from importlib.resources import files

import jsonschema
import pytest

from ktx_jax import LLM, Grammar, KtxError, SamplingParams

pytest.importorskip("llguidance")

SCHEMAS = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", 3, None]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"x": {"const": [1, "é"]}}, "required": ["x"]}]},
    {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    {"type": "string", "pattern": "^[a-c]{3,5}-[0-9]+$"},
    {"type": "number", "minimum": -2, "exclusiveMaximum": 7.5},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(files("ktx_jax") / "data" / "tiny-q8_0.gguf"), context=512, batch=4)


def sampled(llm, grammar, *, seed, **options):
    how = {"max_tokens": 200, "temperature": 1.5, "top_p": 1.0, "seed": seed} | options
    [reply] = llm.generate("Give me the data.", SamplingParams(grammar=grammar, **how))
    return reply


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_reply_validates(llm, schema):
    grammar = Grammar.from_json_schema(schema, llm.tokenizer)
    ended = 0
    for seed in range(6):
        reply = sampled(llm, grammar, seed=seed)
        if reply.finish_reason == "stop":
            jsonschema.validate(json.loads(reply.text), schema)
            ended += 1
        else:
            assert (reply.finish_reason, len(reply.token_ids)) == ("length", 200)
    assert ended >= 2


def test_a_cut_reply_can_be_completed(llm):
    grammar = Grammar.from_json_schema(SCHEMAS[0], llm.tokenizer)
    for length in (1, 3, 7):
        reply = sampled(llm, grammar, seed=2, max_tokens=length)
        match = grammar.start()
        assert all(match.accept(token) for token in reply.token_ids)
        assert reply.finish_reason == ("stop" if match.complete else "length")


def test_any_json_object(llm):
    grammar = Grammar.json_object(llm.tokenizer)
    replies = [sampled(llm, grammar, seed=seed, temperature=0.7) for seed in range(8)]
    ended = [reply.text for reply in replies if reply.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(reply.text.startswith("{") for reply in replies)


def test_an_expression_and_a_grammar(llm):
    date = Grammar.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", llm.tokenizer)
    for seed in range(3):
        reply = sampled(llm, date, seed=seed)
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", reply.text)
        assert reply.finish_reason == "stop"
    calls = Grammar.from_lark(
        """
        start: call+
        call: "<call>" NAME %json {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
          "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}} "</call>"
        NAME: /[a-z]{1,5}/
        """,
        llm.tokenizer,
    )
    reply = sampled(llm, calls, seed=1, stop=["</call>"])
    assert re.fullmatch(r'<call>[a-z]{1,5}\{"a":(true|false)\}', reply.text)


def test_neighbours_do_not_matter(llm):
    """Constrained, edited and plain rows of one step; each as it is alone."""
    grammars = [Grammar.from_json_schema(schema, llm.tokenizer) for schema in SCHEMAS[:2]]
    asks = [
        SamplingParams(max_tokens=40, temperature=0.9, seed=3, grammar=grammars[0]),
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0, grammar=grammars[1], ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=40, temperature=0.9, seed=4, ignore_eos=True, presence_penalty=1.0),
    ]
    alone = [llm.generate("Give", params)[0] for params in asks]
    streams = [llm.stream("Give", params) for params in asks]
    ids = [[] for _ in asks]
    live = dict(enumerate(streams))
    while live:
        for i, stream in list(live.items()):
            chunk = next(stream, None)
            if chunk is None:
                del live[i]
            else:
                ids[i] += chunk.token_ids
    if llm.implementation == "ffi":
        assert [tuple(tokens) for tokens in ids] == [reply.token_ids for reply in alone]
    json.loads(alone[2].text)


def test_one_grammar_serves_many_requests_at_once(llm):
    grammar = Grammar.from_json_schema(SCHEMAS[1], llm.tokenizer)
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=5, grammar=grammar)
    replies = llm.generate([[0, 5 + i] for i in range(6)], params)
    for reply in replies:
        if reply.finish_reason == "stop":
            jsonschema.validate(json.loads(reply.text), SCHEMAS[1])


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (Grammar.from_json_schema, {"type": "objekt"}, "the JSON schema cannot be used: Invalid type: objekt"),
        (Grammar.from_json_schema, {"$ref": "#/$defs/x"}, "the JSON schema cannot be used"),
        (Grammar.from_json_schema, "{oops", "the JSON schema cannot be used"),
        (Grammar.from_json_schema, {"type": "string", "pattern": "(?=a)"}, "the JSON schema cannot be used"),
        (Grammar.from_regex, "(a", "the regular expression cannot be used"),
        (Grammar.from_lark, "start: nothing", 'the grammar cannot be used: .*unknown name: "nothing"'),
    ],
)
def test_what_cannot_be_held_to_is_an_error(llm, make, source, message):
    with pytest.raises(KtxError, match=message):
        make(source, llm.tokenizer)


def test_without_llguidance_the_error_says_what_to_install(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(KtxError, match=r"pip install 'ktx-jax\[serve\]'"):
        Grammar.json_object(llm.tokenizer)


def test_a_grammar_that_grows_beyond_bounds_ends_its_request_alone(llm, monkeypatch):
    from ktx_jax.engine.grammar import Match

    def allowed(self):
        raise KtxError("the reply's grammar became too large")

    grammar = Grammar.json_object(llm.tokenizer)
    other = llm.stream("Give", SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    next(other)
    monkeypatch.setattr(Match, "allowed", allowed)
    with pytest.raises(KtxError, match="too large"):
        llm.generate("Give", SamplingParams(grammar=grammar))
    assert [chunk.finish_reason for chunk in other][-1] == "length"
    assert llm._engine.stats().running == 0
